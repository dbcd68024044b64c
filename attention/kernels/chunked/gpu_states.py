"""The state before every chunk: a walk over the chunks, in Mosaic GPU.

  S <- kept * S + sum_t w_t x_t y_t^T      z <- kept * z + sum_t u_t x_t

Forward, x and y are keys and values. Backward, they are the queries and the
gradients of the outputs of a whole group, in reverse: the gradient of the state
after each chunk. A thread block is one warpgroup: 64 rows of S, a block of its
columns, both in registers from the first chunk to the last.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels.chunked import hopper
from attention.kernels.chunked.hopper import CHUNK

ROWS = 64  # of S
STAGES = 3


def states(plan, x, y, scales, s, z, *, reverse):
  """Returns the states before every chunk and after the last one.

  Args:
    plan: hopper.Plan.
    x: [B,T,K*G,H], T a multiple of 8.
    y: [B,T,K*G,V].
    scales: [B,K*G,chunks*R,CHUNK] or None; for each chunk the R rows w, kept
      (repeated) and with z u. None: all are 1.
    s: [B,K,H,V] in float32.
    z: [B,K,H] in float32 or None.
    reverse: the last chunk comes first.

  Returns:
    {'states': [B*K*chunks,H,V] in the dtype of x, 'last': as s,
    'z_states': [B,K*chunks,..] in float32, H filled up with zeros to a multiple
    of 64, 'z_last': as z}.
  """
  B, K, H, V = s.shape
  columns = V if V <= 128 else 64
  rows = None if scales is None else scales.shape[2] // plan.chunks
  like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
  tile = functools.partial(hopper.tile, dtype=x.dtype, cut=math.gcd(H, V))
  vector = plgpu.SMEM((ROWS,), jnp.float32)
  operands = dict(x=x, y=y, scales=scales, s=s, z=z)
  outputs = dict(
      states=like(B * K * plan.chunks, H, V, dtype=x.dtype),
      last=like(*s.shape),
      z_states=None if z is None else like(
          B, K * plan.chunks, pl.cdiv(H, ROWS) * ROWS),
      z_last=None if z is None else like(*z.shape))
  scratch = dict(
      x=tile(STAGES, CHUNK, ROWS),
      y=tile(STAGES, CHUNK, columns),
      scales=None if scales is None else plgpu.SMEM(
          (STAGES, rows, CHUNK), jnp.float32),
      scaled=None if scales is None else tile(CHUNK, ROWS),
      before=tile(ROWS, columns),
      end=hopper.tile(ROWS, columns, dtype=jnp.float32, cut=V),
      z=None if z is None else vector,
      ready=plgpu.Barrier(num_arrivals=2 + (scales is not None),
                          num_barriers=STAGES),
      start=plgpu.Barrier(num_arrivals=1 + (z is not None)))
  grid = dict(b=B, k=K, part=pl.cdiv(H, ROWS), block=pl.cdiv(V, columns))
  return hopper.launch(
      functools.partial(_kernel, reverse), plan, grid, operands, outputs,
      scratch, name='backward_states' if reverse else 'states')


def _kernel(reverse, plan, refs, buffers):
  gmem, smem = types.SimpleNamespace(**refs), types.SimpleNamespace(**buffers)
  batch, head, part, block = map(lax.axis_index, ('b', 'k', 'part', 'block'))
  width = smem.y.shape[-1]
  rows, columns = pl.ds(part * ROWS, ROWS), pl.ds(block * width, width)
  scaled, summed = 'scales' in refs, 'z' in refs
  steps = plan.chunks * plan.G

  def place(step):
    chunk = step if plan.G == 1 else lax.div(step, jnp.int32(plan.G))
    member = 0 if plan.G == 1 else lax.rem(step, jnp.int32(plan.G))
    return (plan.chunks - 1 - chunk if reverse else chunk), member

  def load(step):
    chunk, member = place(step)
    slot = lax.rem(step, jnp.int32(STAGES))
    times = pl.ds(chunk * CHUNK, CHUNK)
    source = head * plan.G + member
    copies = [(gmem.x.at[batch, times, source, rows], smem.x.at[slot]),
              (gmem.y.at[batch, times, source, columns], smem.y.at[slot])]
    if scaled:
      count = smem.scales.shape[1]
      copies.append((
          gmem.scales.at[batch, source, pl.ds(chunk * count, count)],
          smem.scales.at[slot]))
    hopper.fetch(copies, smem.ready.at[slot])

  def write(chunk, S, z):
    """Writes the state before a chunk, once the last one has been read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.before[...] = S.astype(smem.before.dtype)
    index = head * plan.chunks + chunk
    copies = [(smem.before, gmem.states.at[
        batch * pl.num_programs(1) * plan.chunks + index, rows, columns])]
    if summed:
      smem.z[...] = z
      copies.append((smem.z, gmem.z_states.at[batch, index, rows]))
    hopper.store(copies)

  def visit(step, carry):
    S, z = carry
    chunk, member = place(step)
    slot = lax.rem(step, jnp.int32(STAGES))
    if plan.G == 1:
      write(chunk, S, z)
    else:
      pl.when(member == 0)(functools.partial(write, chunk, S, z))
    plgpu.barrier_wait(smem.ready.at[slot])
    S, z = _advance(smem, slot, S, z)
    plgpu.commit_smem()
    pl.when(step + STAGES < steps)(functools.partial(load, step + STAGES))
    return S, z

  for step in range(min(STAGES, steps)):
    load(jnp.int32(step))
  copies = [(gmem.s.at[batch, head, rows, columns], smem.end)]
  if summed:
    copies.append((gmem.z.at[batch, head, rows], smem.z))
  hopper.fetch(copies, smem.start)
  plgpu.barrier_wait(smem.start)
  z = plgpu.layout_cast(smem.z[...], hopper.PER_COLUMN) if summed else ()
  S = plgpu.layout_cast(smem.end[...], hopper.TILE)
  S, z = lax.fori_loop(0, steps, visit, (S, z))
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  smem.end[...] = S
  copies = [(smem.end, gmem.last.at[batch, head, rows, columns])]
  if summed:
    smem.z[...] = z
    copies.append((smem.z, gmem.z_last.at[batch, head, rows]))
  hopper.store(copies)
  plgpu.wait_smem_to_gmem(0)


def _advance(smem, slot, S, z):
  """S and z after the x and y of a slot."""
  x = smem.x.at[slot]
  if hasattr(smem, 'scales'):
    tile = plgpu.layout_cast(x[...], hopper.TILE).astype(jnp.float32)
    smem.scaled[...] = hopper.weigh(
        tile, hopper.by_row(smem.scales[slot, 0], tile.shape)).astype(x.dtype)
    S = hopper.weigh(S, hopper.by_row(smem.scales[slot, 1], S.shape))
    if hasattr(smem, 'z'):
      kept = plgpu.layout_cast(smem.scales[slot, 1], hopper.PER_COLUMN)
      z = hopper.weigh(z, kept)
      tile = hopper.weigh(tile, hopper.by_row(
          smem.scales[slot, smem.scales.shape[1] - 1], tile.shape))
    plgpu.commit_smem()
    x = smem.scaled
  elif hasattr(smem, 'z'):
    tile = plgpu.layout_cast(x[...], hopper.TILE).astype(jnp.float32)
  if hasattr(smem, 'z'):
    z = z + plgpu.layout_cast(jnp.sum(tile, axis=0), hopper.PER_COLUMN)
  S = S + hopper.product(hopper.transposed(x), smem.y.at[slot])
  return S, z
