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

import jax.numpy as jnp

from attention.kernels import mosaic_tpu
from attention.kernels.flash import Rule
from attention.kernels.flash.tpu import blocks
from attention.kernels.mosaic_tpu import LOG2E, padded_width, round_up


class Plan(NamedTuple):
  """What a kernel is specialised to."""
  rule: Rule
  blocks: blocks.Blocks
  kinds: tuple
  listed: int  # visits in a row of the list, 0 if one row serves the batch
  S: int
  folded: int  # T where a block holds all queries of a group, else 0
  segments: bool


class Launch(mosaic_tpu.Launch):
  """Layouts and grid: (rows of the batch, key heads, query heads, visits)."""

  bounds_checks = False  # Arrays are padded to whole blocks.

  def __init__(self, operands, rule, *, backward):
    q, _, v, q_ids, kv_ids, q_offset, *_ = operands
    self.B, self.T, self.N, H = q.shape
    S, self.K, V = v.shape[1:]
    self.H, self.V = padded_width(H), padded_width(V)
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
    self.q_ids = q_ids
    self.n_rows = rows if folded else self.T
    cut = sizes(self.n_rows)
    self.n_keys = round_up(S, cut.k)
    visits = blocks.visits(
        cut, self.T, S, q_ids, kv_ids, q_offset, causal=rule.causal,
        window=rule.window, folded=folded)
    batches, listed = visits.words.shape
    self.scores = self.B * self.K * self.G * listed * cut.q * cut.k
    self.plan = Plan(
        rule, cut, visits.kinds, listed if batches > 1 else 0, S,
        self.T if folded else 0, q_ids is not None)
    self.grid = self.B, self.K, self.G, visits.steps
    self.axes = dict(
        batch=(self.B, None), head=(self.K * self.G, None),
        key_head=(self.K, None),
        queries=(round_up(self.n_rows, cut.q), cut.q),
        keys=(self.n_keys, cut.k))
    self.prefetch = dict(
        visits=jnp.asarray(visits.words).reshape(-1),
        q_offset=jnp.asarray(q_offset, jnp.int32).reshape(1))
    self.vmem = mosaic_tpu.vmem_bytes()

  def place(self, b, h, g, step, visits, _):
    i, j, *_ = blocks.unpack(visits[b * self.plan.listed + step])
    return dict(batch=b, head=h * self.G + g, key_head=h, queries=i, keys=j)

  def queries(self, width):
    return self.layout('batch', 'head', 'queries', width)

  def rows(self, number=1):
    return self.layout('batch', 'head', number, 'queries')

  def all_keys(self, width):
    return self.layout('batch', 'key_head', self.n_keys, width)

  def operands(self, operands, *, dout=None, lse=None, delta=None):
    """By name; dout, lse and delta of the backward kernel."""
    _, k, v, _, kv_ids, *_ = operands
    lse_delta = None
    if lse is not None:
      lse_delta = jnp.stack([
          x.reshape(self.B, -1, self.n_rows) for x in (lse * LOG2E, delta)], 2)
    keys = lambda x, width: self.layout(
        'batch', 'key_head', 'keys', width).of(jnp.swapaxes(x, 1, 2))
    ids = lambda x, axis: None if x is None else self.layout(
        'batch', 1, axis).of(x[:, None])
    return dict(
        q=self._queries(operands.q, self.H), k=keys(k, self.H),
        v=keys(v, self.V), dout=self._queries(dout, self.V),
        lse_delta=self.rows(2).of(lse_delta), q_ids=ids(self.q_ids, 'queries'),
        kv_ids=ids(kv_ids, 'keys'))

  def _queries(self, x, width):
    """[B,T,N,H] -> [B,heads,rows,H]."""
    if x is None:
      return None
    x = jnp.swapaxes(x, 1, 2)
    return self.queries(width).of(
        x.reshape(self.B, -1, self.n_rows, x.shape[3]))

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
