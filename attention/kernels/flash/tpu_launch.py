"""How the TPU kernels are launched: layouts, block specs, grid."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels.flash import Rule, tpu_blocks
from attention.kernels.tpu_tiles import pad, padded_width, round_up


class Spec(NamedTuple):
  """What a kernel is specialised to."""
  blocks: tpu_blocks.Blocks
  kinds: tuple
  listed: int  # visits in a row of the list, 0 if one row serves the batch
  S: int
  folded: int  # T where a block holds all queries of a group, else 0
  ids: bool
  rule: Rule


class Launch:
  """One kernel launch: layouts, block specs and grid."""

  def __init__(self, operands, rule, *, backward):
    q, _, v, q_ids, kv_ids, q_offset = operands
    self.B, self.T, self.N, H = q.shape
    S, self.K, V = v.shape[1:]
    sizes = functools.partial(
        tpu_blocks.block_sizes, S=S, widest=max(H, V),
        itemsize=q.dtype.itemsize, backward=backward,
        window=rule.window, packed=q_ids is not None)
    # A few queries (decoding): those of a whole group share one block, so
    # that K and V are read once and not G times.
    self.G = self.N // self.K
    rows = self.G * self.T
    folded = self.G > 1 and sizes(rows).q >= rows
    if folded:
      self.G = 1
      q_ids = None if q_ids is None else jnp.tile(q_ids, (1, rows // self.T))
    self.n_rows = rows if folded else self.T
    self.blocks = sizes(self.n_rows)
    self.n_queries = round_up(self.n_rows, self.blocks.q)
    self.n_keys = round_up(S, self.blocks.k)
    self.visits = tpu_blocks.visits(
        self.blocks, self.T, S, q_ids, kv_ids, q_offset,
        causal=rule.causal, window=rule.window, folded=folded)
    batches, listed = self.visits.words.shape
    self.spec = Spec(
        self.blocks, self.visits.kinds, listed if batches > 1 else 0, S,
        self.T if folded else 0, q_ids is not None, rule)
    self.q_offset = jnp.asarray(q_offset, jnp.int32).reshape(1)
    self.ids = []
    if q_ids is not None:
      self.ids = [
          (pad(q_ids[:, None], 2, self.n_queries), self._spec(
              (None, 1, self.blocks.q), lambda b, n, h, i, j: (b, 0, i))),
          (pad(kv_ids[:, None], 2, self.n_keys), self._spec(
              (None, 1, self.blocks.k), lambda b, n, h, i, j: (b, 0, j)))]

  def _spec(self, shape, index):
    """A block chosen by batch, query head, key head, query and key block."""
    G, listed = self.G, self.spec.listed

    def index_map(b, h, g, step, words, _):
      i, j, *_ = tpu_blocks.unpack(words[b * listed + step])
      return index(b, h * G + g, h, i, j)

    return pl.BlockSpec(shape, index_map)

  def queries(self, x):
    """[B,T,N,H] -> ([B,heads,rows,H], its block)."""
    x = jnp.swapaxes(x, 1, 2).reshape(self.B, self.K * self.G, self.n_rows, -1)
    x = pad(pad(x, 2, self.n_queries), 3, padded_width(x.shape[-1]))
    return x, self._spec((None, None, self.blocks.q, x.shape[3]),
                         lambda b, n, h, i, j: (b, n, i, 0))

  def rows(self, *arrays):
    """[B,N,T] each -> ([B,heads,arrays,rows], its block)."""
    x = jnp.stack([x.reshape(self.B, self.K * self.G, self.n_rows)
                   for x in arrays], axis=2)
    return pad(x, 3, self.n_queries), self._spec(
        (None, None, len(arrays), self.blocks.q),
        lambda b, n, h, i, j: (b, n, 0, i))

  def keys(self, x):
    """[B,S,K,H] -> ([B,K,keys,H], its block)."""
    x = pad(jnp.swapaxes(x, 1, 2), 2, self.n_keys)
    x = pad(x, 3, padded_width(x.shape[-1]))
    return x, self._spec((None, None, self.blocks.k, x.shape[3]),
                         lambda b, n, h, i, j: (b, h, j, 0))

  def out_queries(self, width, dtype):
    shape = (self.B, self.K * self.G, self.n_queries, width)
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.blocks.q, width), lambda b, n, h, i, j: (b, n, i, 0))

  def out_rows(self):
    shape = (self.B, self.K * self.G, 1, self.n_queries)
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._spec(
        (None, None, 1, self.blocks.q), lambda b, n, h, i, j: (b, n, 0, i))

  def out_keys(self, width, dtype):
    """All keys of a head, written once."""
    shape = (self.B, self.K, self.n_keys, width)
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.n_keys, width), lambda b, n, h, i, j: (b, h, 0, 0))

  def restore(self, x, width):
    """[B,heads,rows,H] -> [B,T,N,H]; [B,heads,1,rows] -> [B,N,T]."""
    if width is None:
      return x[:, :, 0, :self.n_rows].reshape(self.B, self.N, self.T)
    x = x[:, :, :self.n_rows, :width]
    return jnp.swapaxes(x.reshape(self.B, self.N, self.T, width), 1, 2)

  def run(self, kernel, inputs, outputs, scratch, *, name, products):
    """Launches a kernel.

    Args:
      kernel: of the refs of visits, q_offset, inputs, ids, outputs and scratch.
      inputs: (array, spec) pairs.
      outputs: (shape, spec) pairs.
      scratch: shapes.
      name: of the kernel.
      products: multiplications for each score, of all its matmuls.
    """
    inputs, in_specs = zip(*inputs, *self.ids)
    shapes, out_specs = zip(*outputs)
    scores = (self.B * self.K * self.G * self.visits.words.shape[1]
              * self.blocks.q * self.blocks.k)
    return pl.pallas_call(
        functools.partial(kernel, spec=self.spec),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(self.B, self.K, self.G, self.visits.steps),
            in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                'parallel', 'parallel', 'arbitrary', 'arbitrary'),
            vmem_limit_bytes=tpu_blocks.vmem_bytes(),
            # Arrays are padded to whole blocks.
            disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * products, transcendentals=scores,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*inputs, *shapes))),
        name=name,
    )(jnp.asarray(self.visits.words).reshape(-1), self.q_offset, *inputs)
