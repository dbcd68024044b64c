"""The outputs of a chunk, given the state before it."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attention.kernels import mosaic_gpu
from attention.kernels.chunked.gpu.chunk import (
    head_of,
    pairs,
    steps,
    weigh,
    weight_copies,
)
from attention.kernels.mosaic_gpu import (
    by_column,
    by_row,
    optional,
    product,
    transposed,
)


def kernel(gmem, smem, plan):
  batch, head, chunk = map(lax.axis_index, ('b', 'k', 'chunk'))
  times = steps(chunk)
  summed = plan.normalize is not None
  slots = smem.q.shape[0]

  def load(member):
    slot = lax.rem(member, jnp.int32(slots))
    source = gmem.q.at[batch, times, head_of(
        gmem.q, head * plan.G + member, plan.K * plan.G)]
    mosaic_gpu.copy_in([(source, smem.q.at[slot])], smem.ready.at[slot])

  def visit(member, carry):
    slot = lax.rem(member, jnp.int32(slots))
    mosaic_gpu.wait(smem.ready.at[slot])
    q = smem.q.at[slot]
    y = product(q, smem.states)
    if smem.before is not None:
      y = weigh(y, by_row(smem.before[...], y.shape))
    s = weigh(product(q, transposed(smem.k)), met)
    y = y + product(s.astype(q.dtype), smem.v)
    if summed:
      tile = mosaic_gpu.load(q).astype(jnp.float32)
      z = by_column(smem.z[pl.ds(0, q.shape[-1])], tile.shape)
      total = jnp.sum(tile * z, axis=1)
      if smem.before is not None:
        total = weigh(total, mosaic_gpu.load(smem.before, mosaic_gpu.PER_ROW))
      inverse = 1 / (total + jnp.sum(s, axis=1) + plan.normalize)
      y = y * by_row(inverse, y.shape)
    mosaic_gpu.wait_read()
    smem.y[...] = y.astype(q.dtype)
    target = head * plan.G + member
    copies = [(smem.y, gmem.y.at[batch, times, target])]
    if summed:
      smem.inverse[...] = inverse
      copies.append((smem.inverse, gmem.inverse.at[batch, target, times]))
    mosaic_gpu.copy_out(copies)
    pl.when(member + slots < plan.G)(lambda: load(member + slots))
    return carry

  for member in range(slots):
    load(jnp.int32(member))
  index = head * plan.chunks + chunk
  mosaic_gpu.copy_in(
      [(gmem.k.at[batch, times, head_of(gmem.k, head, plan.K)], smem.k),
       (gmem.v.at[batch, times, head], smem.v),
       (gmem.states.at[batch * plan.K * plan.chunks + index], smem.states),
       *optional(gmem.z, (batch, index), smem.z),
       *weight_copies(gmem, smem, batch, head, chunk)], smem.own_ready)
  mosaic_gpu.wait(smem.own_ready)
  met = pairs(smem, later=0)
  lax.fori_loop(0, plan.G, visit, ())
  mosaic_gpu.wait_written()
