"""What the Mosaic GPU kernels of chunks share: tiles, vectors, decays."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # steps: the rows of a warpgroup's wgmma
LEVELS = 6  # halvings of a chunk
TILE = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = TILE.reduce(1), TILE.reduce(0)


class Plan(NamedTuple):
  """What a kernel is compiled for, beside the shapes of its operands."""
  G: int  # query heads of a key head
  chunks: int
  normalize: float | None


def launch(body, plan, grid, operands, outputs, scratch, *, name,
           warpgroups=1):
  """Runs body(plan, refs, scratch), refs being operands and outputs by name.

  Args:
    body: the kernel.
    plan: Plan.
    grid: {axis: size}, the last one varies fastest.
    operands: {name: array}; those that are None are left out.
    outputs: {name: ShapeDtypeStruct}, likewise.
    scratch: {name: reference type}, likewise.
    name: of the kernel, in profiles.
    warpgroups: of a thread block, axis 'warpgroup'.

  Returns:
    {name: array} of the outputs.
  """
  present = lambda xs: {k: x for k, x in xs.items() if x is not None}
  operands, outputs, scratch = map(present, (operands, outputs, scratch))

  def named(*refs, **buffers):
    body(plan, dict(zip((*operands, *outputs), refs, strict=True)), buffers)

  results = plgpu.kernel(
      named, out_type=list(outputs.values()), scratch_types=scratch,
      grid=tuple(grid.values()), grid_names=tuple(grid),
      num_threads=warpgroups, thread_name='warpgroup',
      kernel_name=f'chunked_{name}',
      # jax 0.12's own choice searches for layouts, and gives up on these.
      compiler_params=plgpu.CompilerParams(
          approx_math=True,
          lowering_semantics=plgpu.LoweringSemantics.Lane))(
              *operands.values())
  return dict(zip(outputs, results, strict=True))


def tile(*shape, dtype, cut):
  """Shared memory for tiles, as TMA writes and wgmma reads them.

  Args:
    *shape: (.., rows, width).
    dtype: of the tiles.
    cut: divides the widths of the arrays that they are cut from. wgmma wants
      both of its operands in the same swizzle: one cut for a kernel.
  """
  lanes = math.gcd(cut, 128 // jnp.dtype(dtype).itemsize)
  return plgpu.SMEM(shape, dtype, transforms=(
      plgpu.TilingTransform((8, lanes)),
      plgpu.SwizzleTransform(lanes * jnp.dtype(dtype).itemsize)))


def fetch(copies, barrier):
  for source, buffer in copies:
    plgpu.copy_gmem_to_smem(source, buffer, barrier)


def store(copies):
  """Starts to write buffers of shared memory out."""
  plgpu.commit_smem()
  for buffer, target in copies:
    plgpu.copy_smem_to_gmem(buffer, target)


def weight_copies(gmem, smem, batch, head, chunk):
  """Copies of those of a chunk's levels, ids and before that there are."""
  copies = []
  if hasattr(gmem, 'levels'):
    rows = pl.ds(chunk * LEVELS, LEVELS)
    copies.append((gmem.levels.at[batch, head, rows], smem.levels))
  if hasattr(gmem, 'ids'):
    times = pl.ds(chunk * CHUNK, CHUNK)
    copies.append((gmem.ids.at[batch, times], smem.ids))
  for name in ('before', 'after'):
    if hasattr(gmem, name):
      copies.append(
          (getattr(gmem, name).at[batch, head, chunk], getattr(smem, name)))
  return copies


def product(a, b, *more):
  """a b, plus the product of each further pair: a in either memory."""
  pairs = [(a, b), *zip(more[::2], more[1::2], strict=True)]

  def multiply(acc):
    for left, right in pairs:
      plgpu.wgmma(acc, left, right)
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1])))


def transposed(ref):
  return ref.transpose((1, 0))


def by_row(x, shape):
  """A vector [rows], broadcast over a tile."""
  return lax.broadcast_in_dim(plgpu.layout_cast(x, PER_ROW), shape, [0])


def by_column(x, shape):
  """A vector [columns], broadcast over a tile."""
  return lax.broadcast_in_dim(plgpu.layout_cast(x, PER_COLUMN), shape, [1])


def weigh(x, weights):
  """x times weights, or where a mask allows it; 0 elsewhere, whatever x is."""
  if weights.dtype == bool:
    return jnp.where(weights, x, 0.0)
  return jnp.where(weights != 0, x * weights, 0.0)


def pairs(levels, ids, *, later):
  """Weights of the pairs of a chunk's steps, a tile, or which of them meet.

  The decay from step s to t > s is that of two spans that meet: the largest
  power of two that the steps differ by divides the chunk into halves of which
  one has s, the next t, and levels[i] has, in halves of 2^i steps, the sum of
  log2 decays from after s to the end of its half, from the start of its half
  to t.

  Args:
    levels: [LEVELS, CHUNK] in shared memory, or None: all weigh the same.
    ids: [CHUNK] in shared memory, documents, or None: all the same.
    later: the axis of the later step: 0 for [t, s], 1 for [s, t].
  """
  shape = (CHUNK, CHUNK)
  t, s = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)
          for axis in (later, 1 - later))
  seen = s <= t
  if ids is not None:
    seen &= by_row(ids[...], shape) == by_column(ids[...], shape)
  if levels is None:
    return seen
  differ = s ^ t
  total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)
  for i in range(LEVELS):
    spans = by_row(levels[i], shape) + by_column(levels[i], shape)
    total = jnp.where(differ >= 2 ** i, spans, total)
  return jnp.where(seen, jnp.exp2(total), 0.0)
