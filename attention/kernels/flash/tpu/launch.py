"""How the TPU kernels of flash attention are launched.

Refs, of a block of Q queries and one of K keys, in float32 but for what has the
operands' dtypes:

  visits            [rows L]       all of the grid, prefetched: `blocks.unpack`
  q_offset          [1]            likewise
  q, dq             [Q,H]
  k, v              [K,H], [K,V]
  dout, out         [Q,V]
  dk, dv            [S,H], [S,V]   of all keys
  lse               [1,Q]
  lse_delta         [2,Q]          lse to base 2, delta
  q_ids, kv_ids     [1,Q], [1,K]   ids of segments

In VMEM, from visit to visit:

  m, l              [1,Q]          running maximum, to base 2, and sum
  out_acc, dq_acc   [V,Q], [H,Q]
  dk_acc, dv_acc    [S,H], [S,V]
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import mosaic_tpu
from attention.kernels.flash import Rule
from attention.kernels.flash.tpu import blocks
from attention.kernels.mosaic_tpu import LOG2E, pad, padded_width, round_up


class Plan(NamedTuple):
  """What a kernel is specialised to."""
  rule: Rule
  blocks: blocks.Blocks
  kinds: tuple
  listed: int  # visits in a row of the list, 0 if one row serves the batch
  S: int
  folded: int  # T where a block holds all queries of a group, else 0
  segments: bool


class Launch:
  """One kernel launch: layouts, block specs and grid.

  The grid is (rows of the batch, key heads, query heads of a key head, visits).

  A method returns an array as the kernel sees it, or the shape of an output,
  with the spec of its blocks; None for an array that is None.
  """

  def __init__(self, operands, rule, *, backward):
    q, _, v, q_ids, kv_ids, q_offset = operands
    self.B, self.T, self.N, H = q.shape
    S, self.K, V = v.shape[1:]
    sizes = functools.partial(
        blocks.sizes, S=S, widest=max(H, V), itemsize=q.dtype.itemsize,
        backward=backward, window=rule.window, packed=q_ids is not None)
    # A few queries (decoding): those of a whole group share one block, so
    # that K and V are read once and not G times.
    self.G = self.N // self.K
    rows = self.G * self.T
    folded = self.G > 1 and sizes(rows).q >= rows
    if folded:
      self.G = 1
      q_ids = None if q_ids is None else jnp.tile(q_ids, (1, rows // self.T))
    self.n_rows = rows if folded else self.T
    cut = sizes(self.n_rows)
    self.n_queries = round_up(self.n_rows, cut.q)
    self.n_keys = round_up(S, cut.k)
    self.visits = blocks.visits(
        cut, self.T, S, q_ids, kv_ids, q_offset, causal=rule.causal,
        window=rule.window, folded=folded)
    batches, listed = self.visits.words.shape
    self.plan = Plan(
        rule, cut, self.visits.kinds, listed if batches > 1 else 0, S,
        self.T if folded else 0, q_ids is not None)
    self.q_ids, self.q_offset = q_ids, q_offset

  def _spec(self, shape, index):
    """A block chosen by batch, query head, key head, query and key block."""
    G, listed = self.G, self.plan.listed

    def index_map(b, h, g, step, words, _):
      i, j, *_ = blocks.unpack(words[b * listed + step])
      return index(b, h * G + g, h, i, j)

    return pl.BlockSpec(shape, index_map)

  def operands(self, operands, *, dout=None, lse=None, delta=None):
    """By name; dout, lse and delta of the backward kernel."""
    lse_delta = None if lse is None else self._rows(lse * LOG2E, delta)
    cut = self.plan.blocks
    return dict(
        q=self._queries(operands.q), k=self._keys(operands.k),
        v=self._keys(operands.v), dout=self._queries(dout),
        lse_delta=lse_delta,
        q_ids=self._ids(self.q_ids, self.n_queries, self._spec(
            (None, 1, cut.q), lambda b, n, h, i, j: (b, 0, i))),
        kv_ids=self._ids(operands.kv_ids, self.n_keys, self._spec(
            (None, 1, cut.k), lambda b, n, h, i, j: (b, 0, j))))

  def _queries(self, x):
    """[B,T,N,H] -> [B,heads,rows,H]."""
    if x is None:
      return None
    x = jnp.swapaxes(x, 1, 2).reshape(self.B, self.K * self.G, self.n_rows, -1)
    x = pad(x, self.n_queries, padded_width(x.shape[3]))
    return x, self.out_queries(x.shape[3], x.dtype)[1]

  def _keys(self, x):
    """[B,S,K,H] -> [B,K,keys,H]."""
    x = pad(jnp.swapaxes(x, 1, 2), self.n_keys, padded_width(x.shape[3]))
    return x, self._spec((None, None, self.plan.blocks.k, x.shape[3]),
                         lambda b, n, h, i, j: (b, h, j, 0))

  def _rows(self, *arrays):
    """[B,N,T] each -> [B,heads,arrays,rows]."""
    x = jnp.stack([x.reshape(self.B, self.K * self.G, self.n_rows)
                   for x in arrays], axis=2)
    return pad(x, self.n_queries), self.out_rows(len(arrays))[1]

  def _ids(self, ids, size, spec):
    """[B,T] -> [B,1,rows], or [B,S] -> [B,1,keys]."""
    return None if ids is None else (pad(ids[:, None], size), spec)

  def out_queries(self, width, dtype):
    """[B,heads,rows,width]."""
    width = padded_width(width)
    shape = self.B, self.K * self.G, self.n_queries, width
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.plan.blocks.q, width),
        lambda b, n, h, i, j: (b, n, i, 0))

  def out_keys(self, width, dtype):
    """[B,K,keys,width], all keys of a head, written once."""
    width = padded_width(width)
    shape = self.B, self.K, self.n_keys, width
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.n_keys, width), lambda b, n, h, i, j: (b, h, 0, 0))

  def out_rows(self, number=1):
    """[B,heads,number,rows]."""
    shape = self.B, self.K * self.G, number, self.n_queries
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._spec(
        (None, None, number, self.plan.blocks.q),
        lambda b, n, h, i, j: (b, n, 0, i))

  def scratch_rows(self):
    return 1, self.plan.blocks.q

  def scratch_queries(self, width):
    return padded_width(width), self.plan.blocks.q

  def scratch_keys(self, width):
    return self.n_keys, padded_width(width)

  def run(self, kernel, *, name, operands, outputs, scratch, products):
    """`mosaic_tpu.launch`, of so many multiplications for each score."""
    cut, words = self.plan.blocks, self.visits.words
    scores = self.B * self.K * self.G * words.shape[1] * cut.q * cut.k
    return mosaic_tpu.launch(
        kernel, self.plan, name=name,
        grid=(self.B, self.K, self.G, self.visits.steps),
        prefetch=dict(
            visits=jnp.asarray(words).reshape(-1),
            q_offset=jnp.asarray(self.q_offset, jnp.int32).reshape(1)),
        operands=operands, outputs=outputs, scratch=scratch,
        flops=2 * scores * products, transcendentals=scores,
        vmem=mosaic_tpu.vmem_bytes(),
        # Arrays are padded to whole blocks.
        bounds_checks=False)

  def restore_queries(self, x, width):
    """[B,heads,rows,H] -> [B,T,N,width]."""
    x = x[:, :, :self.n_rows, :width]
    return jnp.swapaxes(x.reshape(self.B, self.N, self.T, width), 1, 2)

  def restore_keys(self, x, width):
    """[B,K,keys,H] -> [B,S,K,width]."""
    return jnp.swapaxes(x, 1, 2)[:, :self.plan.S, :, :width]

  def restore_rows(self, x):
    """[B,heads,1,rows] -> [B,N,T]."""
    return x[:, :, 0, :self.n_rows].reshape(self.B, self.N, self.T)
