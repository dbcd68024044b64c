"""The decays of a chunk: vectors before the kernels, tiles of pairs in them.

The decay from step s to t > s is that of two spans that meet: the largest power
of two that the steps differ by divides the chunk into halves of which one has
s, the next t. `levels` has, in halves of 2^i steps, the sums of log2 decays
from after each step to the end of its half, or from the start of its half to
it. Sums of logarithms over exactly the steps that they span: nothing is
subtracted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.mosaic_gpu import by_column, by_row, optional

CHUNK = mosaic_gpu.ROWS  # steps
LEVELS = 6  # halvings of a chunk
_FORGOTTEN = -1e30  # log of a decay to 0: 64 of them can be added up.


class Weights(NamedTuple):
  """What a chunk weighs its steps with; None where everything weighs 1."""
  levels: jax.Array | None  # [B,K,chunks*LEVELS,CHUNK]
  ids: jax.Array | None  # [B,chunks*CHUNK], documents; only without levels
  before: jax.Array | None  # [B,K,chunks,CHUNK], from the state to each step
  after: jax.Array | None  # likewise, from each step to the end of the chunk
  kept: jax.Array | None  # [B,K,chunks], from state to state


def weights(v, decay, starts):
  """Weights of a call: v [B,T,K,V], decay [B,T,K], starts [B,T] or None."""
  if decay is None and starts is None:
    return Weights(*(None,) * 5)
  logs = (jnp.zeros((v.shape[0], v.shape[2], v.shape[1])) if decay is None
          else jnp.swapaxes(decay.astype(jnp.float32), 1, 2))
  # The state before is forgotten where a document starts.
  if starts is not None:
    logs = jnp.where(starts[:, None], _FORGOTTEN, logs)
  logs = chunks(jnp.maximum(logs, _FORGOTTEN))
  levels, before, after = spans(logs)
  before, after = jnp.exp(before), jnp.exp(after)
  ids = None
  if decay is None:
    levels = None
    ids = jnp.cumsum(chunks(starts.astype(jnp.int32)), axis=-1)
    ids = ids.reshape(ids.shape[0], -1)
  else:
    levels = (levels * mosaic_gpu.LOG2E).reshape(*logs.shape[:2], -1, CHUNK)
  return Weights(levels, ids, before, after, before[..., -1])


def spans(logs):
  """Sums of [..,CHUNK] over the spans within ever larger blocks.

  Returns:
    [..,LEVELS,CHUNK], the levels; and [..,CHUNK] twice: from the start of the
    chunk to each step, and from after each step to the end.
  """
  levels, until, beyond = [], logs, jnp.zeros_like(logs)
  for level in range(LEVELS):
    halves = (*logs.shape[:-1], -1, 2, 2 ** level)
    (a, b), (c, d) = (
        jnp.split(x.reshape(halves), 2, axis=-2) for x in (until, beyond))
    join = lambda *parts: jnp.concatenate(parts, -2).reshape(logs.shape)
    levels.append(join(c, b))
    # The last sum of a half is that of all its steps.
    until = join(a, b + a[..., -1:])
    beyond = join(c + b[..., -1:], d)
  return jnp.stack(levels, axis=-2), until, beyond


def decay_gradient(weights, starts, passed, sums):
  """[B,K,chunks*CHUNK]: each step's decay is in all spans that it lies in.

  Args:
    weights: Weights.
    starts: [B,T] or None.
    passed: [B,K,chunks], the gradient of the decays from state to state.
    sums: 'rows', 'columns' and 'ends' of launch.gradients.
  """
  rows, columns, ends = (
      chunks(sums[name]) for name in ('rows', 'columns', 'ends'))
  step = jnp.arange(CHUNK)
  later, earlier = step >= step[:, None], step < step[:, None]
  first = jnp.zeros((1, 1, 1, CHUNK), bool)
  if starts is not None:
    first = chunks(starts)[:, None]
    ids = jnp.cumsum(first, axis=-1)
    same = ids[..., None, :] == ids[..., None]
    later, earlier = later & same, earlier & same
  # Spans that end from here on, less those of them that start from here on.
  masked = lambda mask, x: jnp.sum(jnp.where(mask, x[..., None, :], 0.0), -1)
  total = masked(later, rows - columns) + masked(earlier, ends)
  kept = weights.kept
  total += jnp.where(kept > 0, kept * passed, 0.0)[..., None]
  return jnp.where(first, 0.0, total).reshape(*kept.shape[:2], -1)


def chunks(x):
  """[..,T] to [..,chunks,CHUNK], filled up with zeros."""
  x = mosaic_gpu.pad(x, axis=-1, multiple=CHUNK)
  return x.reshape(*x.shape[:-1], -1, CHUNK)


def steps(chunk):
  return pl.ds(chunk * CHUNK, CHUNK)


def head_of(array, head, heads):
  """The head of an array [B,T,J,..] that one of so many heads reads."""
  share = heads // array.shape[2]
  return head if share == 1 else lax.div(head, jnp.int32(share))


def weight_copies(gmem, smem, batch, head, chunk):
  """Copies of those of a chunk's levels, ids and decays that there are."""
  levels = pl.ds(chunk * LEVELS, LEVELS)
  return [
      *optional(gmem.levels, (batch, head, levels), smem.levels),
      *optional(gmem.ids, (batch, steps(chunk)), smem.ids),
      *optional(gmem.before, (batch, head, chunk), smem.before),
      *optional(gmem.after, (batch, head, chunk), smem.after)]


def pairs(smem, *, later):
  """Weights of the pairs of a chunk's steps, a tile, or which of them meet.

  Args:
    smem: levels [LEVELS,CHUNK], without them ids [CHUNK]; None: all the same.
    later: the axis of the later step: 0 for [t, s], 1 for [s, t].
  """
  shape = (CHUNK, CHUNK)
  t, s = (plgpu.broadcasted_iota(jnp.int32, shape, axis,
                                 layout=mosaic_gpu.TILE)
          for axis in (later, 1 - later))
  seen = s <= t
  if smem.ids is not None:
    seen &= (by_row(smem.ids[...], shape)
             == by_column(smem.ids[...], shape))
  if smem.levels is None:
    return seen
  differ = s ^ t
  total = mosaic_gpu.filled(shape, 0.0)
  for i in range(LEVELS):
    # Each load is of the layout that it is for.
    span = (by_row(smem.levels[i], shape)
            + by_column(smem.levels[i], shape))
    total = jnp.where(differ >= 2 ** i, span, total)
  return jnp.where(seen, jnp.exp2(total), 0.0)


def weigh(x, weights):
  """x times weights, or where a mask allows it; 0 elsewhere, whatever x is."""
  if weights.dtype == bool:
    return jnp.where(weights, x, 0.0)
  return jnp.where(weights != 0, x * weights, 0.0)
