"""What the Mosaic GPU scan kernels share: operands, layouts, copies, functions.

A thread block is one warpgroup with a channel in each of its 128 threads, the
states of a channel in registers: a tile [128, W] has its rows in the threads, a
row [128] one number in each, and what all channels share is the same in all.
More states than 16 are S tiles of W = 16.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels.scan import pieces

LANES = 128  # channels of a thread block
CHUNK = 16  # steps of a buffer, and between saved states
TILE = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
LOG2E = math.log2(math.e)
LN2 = math.log(2)
# artanh(sqrt w) / sqrt w for w in [0, 1/9] to 4e-9, at Chebyshev's points.
_ARTANH = (1.0, 0.33333161, 0.20012298, 0.13982579, 0.14078889)


class Plan(NamedTuple):
  """What a kernel is compiled for, beside the shapes of its operands."""
  dt_softplus: bool
  gated: bool
  marked: bool  # some steps start documents
  T: int
  S: int  # tiles of states
  W: int  # states in a tile
  chunks: int
  pieces: int

  @property
  def steps(self):
    """T in whole chunks."""
    return self.chunks * CHUNK


class Operands(NamedTuple):
  """The operands as the kernels take them, E a multiple of 8, M = S W."""
  series: list[jax.Array]  # x, dt, z if gated: [B, T, E]
  common: jax.Array  # float32 [B, T, 2M (+ 4)]: B, C, whether a document starts
  rows: jax.Array  # float32 [2, E]: bias of the step size, weight of the skip
  A: jax.Array  # float32 [S, E, W], times log2 e


def prepare(operands, rule):
  """Returns Plan and Operands of the arguments of an implementation."""
  x, dt, A, B, C, D, z, dt_bias, _, starts = operands
  batch, T, E = x.shape
  M = padded_states(A.shape[1])
  S = max(1, M // 16)
  chunks = pl.cdiv(T, CHUNK)
  plan = Plan(rule.dt_softplus, z is not None, starts is not None, T, S, M // S,
              chunks, pieces.number(batch * pl.cdiv(E, LANES), chunks))
  f32 = lambda array: array.astype(jnp.float32)
  common = [_pad(f32(array), M - A.shape[1]) for array in (B, C)]
  if plan.marked:
    # Four numbers, not one: a TMA copy takes whole 16 bytes.
    common.append(jnp.repeat(f32(starts)[..., None], 4, -1))
  bias = jnp.zeros_like(D) if dt_bias is None else dt_bias
  rows = jnp.stack([f32(bias), f32(D)])
  series = [x, dt] if z is None else [x, dt, z]
  return plan, Operands(
      [pad_channels(array) for array in series], jnp.concatenate(common, -1),
      pad_channels(rows), split_states(plan, f32(A) * LOG2E))


def padded_states(M):
  return max(8, 1 << (M - 1).bit_length())


def pad_channels(array):
  """To a multiple of 8 in the last axis, as TMA wants rows of 16 bytes."""
  return _pad(array, -array.shape[-1] % 8)


def split_states(plan, array):
  """[..., E, M] to float32 [..., S, E, W], filled up with zeros."""
  array = array.astype(jnp.float32)
  *lead, E, M = array.shape
  fill = [(0, 0)] * len(lead) + [(0, -E % 8), (0, plan.S * plan.W - M)]
  array = jnp.pad(array, fill)
  return array.reshape(*lead, -1, plan.S, plan.W).swapaxes(-3, -2)


def join_states(array, E, M):
  """The inverse of split_states."""
  array = array.swapaxes(-3, -2)
  return array.reshape(*array.shape[:-2], -1)[..., :E, :M]


def _pad(array, missing):
  if not missing:
    return array
  return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def launch(body, plan, operands, outputs, scratch, *, name):
  """Runs body(plan, *operands, *outputs, **scratch).

  The grid is (batch, piece, block of channels): blocks vary fastest, since they
  share B and C in the L2 cache.
  """
  batch, _, E = operands[0].shape
  return plgpu.kernel(
      functools.partial(body, plan), out_type=outputs, scratch_types=scratch,
      grid=(batch, plan.pieces, pl.cdiv(E, LANES)),
      grid_names=('b', 'piece', 'block'), kernel_name=f'scan_{name}',
      compiler_params=plgpu.CompilerParams(
          approx_math=True,
          # The default of jax 0.12, Warpgroup, cannot slice padded buffers.
          lowering_semantics=plgpu.LoweringSemantics.Lane,
          # They would come with every store. Threads keep to their own
          # channel, and where they do not, commit_smem is the barrier.
          unsafe_no_auto_barriers=True))(*operands)


def coordinates():
  """Batch, piece and channels of a thread block."""
  batch, piece, block = map(lax.axis_index, ('b', 'piece', 'block'))
  return batch, piece, pl.ds(block * LANES, LANES)


def span(plan, piece):
  """First chunk of a piece, and how many it has."""
  length = pl.cdiv(plan.chunks, plan.pieces)
  first = piece * length
  return first, jnp.minimum(length, plan.chunks - first)


def steps_of(chunk):
  return pl.ds(chunk * CHUNK, CHUNK)


def series_buffer(stages, dtype):
  return plgpu.SMEM((stages, CHUNK, LANES), dtype)


def common_buffer(plan, stages):
  width = 2 * plan.S * plan.W + 4 * plan.marked
  return plgpu.SMEM((stages, CHUNK, width), jnp.float32)


def tile_buffer(plan, *lead):
  """Tiles in shared memory, where threads meet no bank conflicts."""
  return plgpu.SMEM((*lead, LANES, plan.W), jnp.float32, transforms=(
      plgpu.TilingTransform((8, plan.W)), plgpu.SwizzleTransform(4 * plan.W)))


def walk(order, n, stages, copies, ready, visit, carry):
  """Folds visit(chunk, slot, carry) over chunks that are loaded ahead.

  Args:
    order: the i-th chunk to visit, of i.
    n: how many there are.
    stages: how many the buffers hold.
    copies: chunk -> pairs of source and buffer [stages, ...].
    ready: a barrier per stage, for as many arrivals as there are pairs.
    visit: leaves with a commit_smem after its last look at the buffers, and
      with no copy out of them under way.
    carry: of the fold.
  """
  def load(i, slot):
    for source, buffer in copies(order(i)):
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])

  def step(i, carry):
    slot = lax.rem(i, stages)
    plgpu.barrier_wait(ready.at[slot])
    carry = visit(order(i), slot, carry)
    pl.when(i + stages < n)(lambda: load(i + stages, slot))
    return carry

  for i in range(stages):
    pl.when(i < n)(functools.partial(load, i, i))
  return lax.fori_loop(0, n, step, carry)


def fetch(barrier, copies):
  """Copies pairs of source and buffer into shared memory, and waits."""
  for source, buffer in copies:
    plgpu.copy_gmem_to_smem(source, buffer, barrier)
  plgpu.barrier_wait(barrier)


def load(ref, layout):
  """Shared memory to registers; what has bank conflicts does not compile."""
  return plgpu.layout_cast(ref[...], layout)


def load_row(ref):
  return load(ref, ROW).astype(jnp.float32)


def zeros(shape, layout):
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def by_row(row, tile):
  """A number per channel, for each of its states."""
  return _broadcast(row, tile.shape, 0)


def by_column(column, tile):
  """A number per state, for each channel."""
  return _broadcast(column, tile.shape, 1)


def _broadcast(array, shape, axis):
  return plgpu.layout_cast(lax.broadcast_in_dim(array, shape, [axis]), TILE)


def directions(plan, common, s):
  """B and C of a step [W], of the s-th tile of states."""
  M = plan.S * plan.W
  return [load(common.at[pl.ds(start + s * plan.W, plan.W)], COLUMN)
          for start in (0, M)]


def starts(plan, common):
  """Whether a document starts with a step, None if none ever does."""
  return common[2 * plan.S * plan.W] > 0 if plan.marked else None


def unless(start, array):
  """Zero where a document starts: whatever was there, inf and nan too."""
  return array if start is None else jnp.where(start, 0.0, array)


def sigmoid(x):
  # Two instructions of the special unit; a division takes ten others.
  root = lax.rsqrt(1 + jnp.exp2(x * -LOG2E))
  return root * root


def step_size(plan, dt, t):
  """d of step t and its slope d(d)/d(dt), both zero past the end."""
  if plan.dt_softplus:
    e = jnp.exp2(jnp.abs(dt) * -LOG2E)
    # log(1 + e) = 2 artanh(e / (2 + e)): as exact for tiny e as for e = 1.
    root = lax.rsqrt(2 + e)
    half = e * root * root
    square = half * half
    series = functools.reduce(lambda sum, c: sum * square + c, _ARTANH[::-1])
    d = jnp.maximum(dt, 0.0) + 2 * half * series
    root = lax.rsqrt(1 + e)
    slope = jnp.where(dt > 0, 1.0, e) * root * root
  else:
    d, slope = dt, jnp.ones_like(dt)
  if plan.T % CHUNK:
    d, slope = (jnp.where(t < plan.T, value, 0.0) for value in (d, slope))
  return d, slope
