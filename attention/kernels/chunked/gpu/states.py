"""The state before every chunk: a walk over the chunks.

  S <- kept * S + sum_t w_t x_t y_t^T      z <- kept * z + sum_t u_t x_t

Forward, x and y are keys and values. Backward, they are the queries and the
gradients of the outputs of a whole group, in reverse: the gradient of the state
after each chunk. A thread block is one warpgroup: 64 rows of S, a block of its
columns, both in registers from the first chunk to the last.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.chunked.gpu.chunk import head_of, steps, weigh
from attention.kernels.mosaic_gpu import PER_COLUMN, ROWS, by_row, optional


def kernel(gmem, smem, plan):
  batch, head, part, block = map(lax.axis_index, ('b', 'k', 'h', 'v'))
  stages, _, width = smem.y.shape
  rows, columns = pl.ds(part * ROWS, ROWS), pl.ds(block * width, width)
  summed = plan.normalize is not None
  visits = plan.chunks * plan.G

  def place(visit):
    chunk = visit if plan.G == 1 else lax.div(visit, jnp.int32(plan.G))
    member = 0 if plan.G == 1 else lax.rem(visit, jnp.int32(plan.G))
    return (plan.chunks - 1 - chunk if plan.reverse else chunk), member

  def load(visit):
    chunk, member = place(visit)
    slot = lax.rem(visit, jnp.int32(stages))
    source = head * plan.G + member
    x_head = head_of(gmem.x, source, plan.K * plan.G)
    copies = [
        (gmem.x.at[batch, steps(chunk), x_head, rows], smem.x.at[slot]),
        (gmem.y.at[batch, steps(chunk), source, columns], smem.y.at[slot])]
    if gmem.scales is not None:
      count = smem.scales.shape[1]
      copies.append((
          gmem.scales.at[batch, source, pl.ds(chunk * count, count)],
          smem.scales.at[slot]))
    mosaic_gpu.copy_in(copies, smem.ready.at[slot])

  def write(chunk, S, z):
    """Writes the state before a chunk, once the last one has been read."""
    mosaic_gpu.wait_read()
    smem.before[...] = S.astype(smem.before.dtype)
    index = head * plan.chunks + chunk
    copies = [(smem.before, gmem.states.at[
        batch * plan.K * plan.chunks + index, rows, columns])]
    if summed:
      smem.z[...] = z
      copies.append((smem.z, gmem.z_states.at[batch, index, rows]))
    mosaic_gpu.copy_out(copies)

  def step(visit, carry):
    S, z = carry
    chunk, member = place(visit)
    slot = lax.rem(visit, jnp.int32(stages))
    if plan.G == 1:
      write(chunk, S, z)
    else:
      pl.when(member == 0)(functools.partial(write, chunk, S, z))
    mosaic_gpu.wait(smem.ready.at[slot])
    S, z = _advance(smem, slot, S, z)
    plgpu.commit_smem()
    pl.when(visit + stages < visits)(functools.partial(load, visit + stages))
    return S, z

  for visit in range(min(stages, visits)):
    load(jnp.int32(visit))
  mosaic_gpu.copy_in(
      [(gmem.s.at[batch, head, rows, columns], smem.end),
       *optional(gmem.z, (batch, head, rows), smem.z)], smem.start)
  mosaic_gpu.wait(smem.start)
  z = mosaic_gpu.load(smem.z, PER_COLUMN) if summed else ()
  S = mosaic_gpu.load(smem.end)
  S, z = lax.fori_loop(0, visits, step, (S, z))
  mosaic_gpu.wait_read()
  smem.end[...] = S
  copies = [(smem.end, gmem.last.at[batch, head, rows, columns])]
  if summed:
    smem.z[...] = z
    copies.append((smem.z, gmem.z_last.at[batch, head, rows]))
  mosaic_gpu.copy_out(copies)
  mosaic_gpu.wait_written()


def _advance(smem, slot, S, z):
  """S and z after the x and y of a slot."""
  x = smem.x.at[slot]
  scaled, summed = smem.scales is not None, smem.z is not None
  if scaled or summed:
    tile = mosaic_gpu.load(x).astype(jnp.float32)
  if scaled:
    weights, kept = smem.scales.at[slot, 0], smem.scales.at[slot, 1]
    smem.scaled[...] = weigh(
        tile, by_row(weights[...], tile.shape)).astype(x.dtype)
    S = weigh(S, by_row(kept[...], S.shape))
    if summed:
      z = weigh(z, mosaic_gpu.load(kept, PER_COLUMN))
      last = smem.scales.shape[1] - 1
      tile = weigh(tile, by_row(smem.scales[slot, last], tile.shape))
    plgpu.commit_smem()
    x = smem.scaled
  if summed:
    z = z + plgpu.layout_cast(jnp.sum(tile, axis=0), PER_COLUMN)
  S = S + mosaic_gpu.product(mosaic_gpu.transposed(x), smem.y.at[slot])
  return S, z
