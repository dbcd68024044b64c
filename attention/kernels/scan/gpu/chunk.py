"""A chunk of steps: how it comes, and what is computed of its numbers.

A thread block is one warpgroup with a channel in each of its 128 threads, the
states of a channel in registers: a tile [128, width] has its rows in the
threads, a row [128] one number in each, and what all channels share is the same
in all.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.mosaic_gpu import LOG2E, optional

CHANNELS = 128  # of a thread block
CHUNK = 16  # steps of a buffer, and between saved states
TILE = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
# artanh(sqrt w) / sqrt w for w in [0, 1/9] to 4e-9, at Chebyshev's points.
_ARTANH = (1.0, 0.33333161, 0.20012298, 0.13982579, 0.14078889)


def coordinates():
  """The place of a thread block: batch, part of the sequence, channels."""
  batch, part, block = map(lax.axis_index, ('b', 'part', 'e'))
  return batch, part, pl.ds(block * CHANNELS, CHANNELS)


def span(plan, part):
  """First chunk of a part, and how many it has."""
  length = pl.cdiv(plan.chunks, plan.parts)
  first = part * length
  return first, jnp.minimum(length, plan.chunks - first)


def steps(chunk):
  return pl.ds(chunk * CHUNK, CHUNK)


def walk(gmem, smem, plan, place, *, visit, carry, states=None, reverse=False):
  """Folds visit(chunk, slot, carry) over the chunks of a part.

  They are loaded ahead: those of the series that there are, and what is common
  to all channels.

  Args:
    gmem: series and common.
    smem: buffers for them, and `ready`, barriers of their copies.
    plan: launch.Plan.
    place: of coordinates.
    visit: leaves with a commit_smem after its last look at the buffers, and
      with no copy out of them under way.
    carry: of the fold.
    states: [B,chunks,..], to be loaded too, or None.
    reverse: the last chunk comes first.
  """
  batch, part, channels = place
  first, n = span(plan, part)
  order = lambda i: first + n - 1 - i if reverse else first + i

  def load(i, slot):
    chunk = order(i)
    index = batch, steps(chunk), channels
    copies = [
        *optional(gmem.x, index, smem.x), *optional(gmem.dt, index, smem.dt),
        *optional(gmem.z, index, smem.z), *optional(gmem.dy, index, smem.dy),
        (gmem.common.at[batch, steps(chunk)], smem.common),
        *optional(states, (batch, chunk, slice(None), channels), smem.state)]
    mosaic_gpu.copy_in(
        [(source, buffer.at[slot]) for source, buffer in copies],
        smem.ready.at[slot])

  def step(i, carry):
    slot = lax.rem(i, plan.stages)
    mosaic_gpu.wait(smem.ready.at[slot])
    carry = visit(order(i), slot, carry)
    pl.when(i + plan.stages < n)(lambda: load(i + plan.stages, slot))
    return carry

  for i in range(plan.stages):
    pl.when(i < n)(functools.partial(load, i, i))
  return lax.fori_loop(0, n, step, carry)


def load_tile(ref):
  return mosaic_gpu.load(ref, TILE)


def load_row(ref):
  return mosaic_gpu.load(ref, ROW).astype(jnp.float32)


def store_row(ref, row):
  ref[...] = row.astype(ref.dtype)


def zero_tile(plan):
  return mosaic_gpu.filled((CHANNELS, plan.width), 0.0, TILE)


def zero_row():
  return mosaic_gpu.filled((CHANNELS,), 0.0, ROW)


def per_channel(row, tile):
  """A number of each channel, for each of its states."""
  return mosaic_gpu.by_row(row, tile.shape, TILE)


def per_state(column, tile):
  """A number of each state, for each channel."""
  return mosaic_gpu.by_column(column, tile.shape, TILE)


def directions(plan, common, s):
  """B and C of a step [width], of the s-th tile of states."""
  return [mosaic_gpu.load(common.at[pl.ds(i * plan.width, plan.width)], COLUMN)
          for i in (s, plan.tiles + s)]


def starts(plan, common):
  """Whether a document starts with a step, None if none ever does."""
  return common[2 * plan.M] > 0 if plan.segments else None


def unless(start, array):
  """Zero where a document starts: whatever was there, inf and nan too."""
  return array if start is None else jnp.where(start, 0.0, array)


def sigmoid(x):
  # Two instructions of the special unit; a division takes ten others.
  root = lax.rsqrt(1 + jnp.exp2(x * -LOG2E))
  return root * root


def silu(x):
  return x * sigmoid(x)


def step_size(plan, dt, t):
  """d of step t and its slope d(d)/d(dt), both zero past the end."""
  if plan.rule.dt_softplus:
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
