"""What both TPU kernels of chunked linear attention do with a chunk.

W, D, a, b and e are those of the equations in `tpu`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import mosaic_tpu
from attention.kernels.mosaic_tpu import LANES, NN, NT, dot


def flat(x):
  """[G,C,H] -> [G C,H]."""
  return x.reshape(-1, x.shape[-1])


def quotient(x, divisor):
  """Of numbers that are not negative: // would ask the chip for its name."""
  return jax.lax.div(jnp.asarray(x, jnp.int32), jnp.int32(divisor))


def clear(fresh, *states):
  """Zeroes states where a document starts."""
  if fresh is None:
    return

  @pl.when(fresh)
  def _():
    for state in states:
      if state is not None:
        state[...] = jnp.zeros_like(state)


def each_chunk(ref, plan, segment, stages, *, distance=1, backward=False):
  """Takes the chunks that a segment has steps in through stages, in order.

  A stage is called with ref, plan, the Steps and what the stage before
  returned. The chunks of a whole block are a pipeline.
  """
  def of_index(stage):
    return lambda index, *made: stage(
        ref, plan, Steps(plan, index, segment), *made)

  stages = [of_index(stage) for stage in stages]
  size, chunks = plan.blocks.chunk, plan.blocks.chunks
  if segment is None or chunks == 1:
    order = list(range(chunks))
    mosaic_tpu.pipeline(
        order[::-1] if backward else order, stages, distance=distance)
    return

  first = quotient(segment[0], size)
  end = quotient(segment[1] + size - 1, size)
  jax.lax.fori_loop(
      first, end, lambda n, _: mosaic_tpu.pipeline(
          [first + end - 1 - n if backward else n], stages), None)


class Steps:
  """The steps of a chunk that are in a segment: how they load and store."""

  def __init__(self, plan, index, segment):
    size = plan.blocks.chunk
    self.index = index
    self.start = index * size
    if not isinstance(index, int):
      self.start = pl.multiple_of(self.start, size)
    self.rows = pl.ds(self.start, size)
    self.segment = segment

  def _inside(self, shape, axis):
    step = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + self.start
    return (step >= self.segment[0]) & (step < self.segment[1])

  def load(self, ref):
    """[..., C, width] of a ref of the block, zero outside the segment."""
    x = ref[..., self.rows, :]
    if self.segment is None:
      return x
    inside = self._inside(x.shape, x.ndim - 2)
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)

  def store(self, ref, x):
    """Writes the steps inside the segment."""
    if self.segment is not None:
      old = ref[..., self.rows, :].astype(jnp.float32)
      x = jnp.where(self._inside(x.shape, x.ndim - 2), x, old)
    ref[..., self.rows, :] = x.astype(ref.dtype)

  def load_row(self, ref):
    """[1,C] of a ref of the block, zero outside the segment."""
    x = ref[:, self.rows]
    return x if self.segment is None else jnp.where(
        self._inside(x.shape, 1), x, 0.0)

  def store_row(self, ref, x):
    """Writes the lanes [1,C] inside the segment."""
    if self.segment is not None:
      x = jnp.where(self._inside(x.shape, 1), x, ref[:, self.rows])
    ref[:, self.rows] = x


class Decays:
  """Decays of a chunk that `write_decays` left.

  Attributes:
    pairs: [C,C], from step s to step t, where s <= t: exp of a sum of logs over
      exactly the steps between.
    after: [1,C], from step s to the state after the chunk.
    all: [1,1], from the state before to the state after.
  """

  def __init__(self, ref, steps):
    self._before, self._after = ref.before, ref.after
    self._index = steps.index
    self.pairs = ref.pairs[steps.index]
    self.after = self.pairs[-1:]
    self.all = ref.before[steps.index, -1:, :1]

  def from_state(self, x):
    """[...,C,width] times the decay from the state before the chunk."""
    return x * _columns(self._before[self._index], x.shape[-1])

  def to_state(self, x):
    """[C,width] times the decay to the state after the chunk."""
    return x * _columns(self._after[self._index], x.shape[-1])


def _columns(x, width):
  """[C,128], whose lanes are equal, as [C,width]."""
  return jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)[:, :width]


def decays_of(ref, steps):
  """Decays of a chunk, None without."""
  return None if ref.decay is None else Decays(ref, steps)


def write_decays(ref, plan, steps):
  """Writes the decays of a chunk.

  Nothing is subtracted: sums of logs are <= 0 however they round, and exact
  beside a decay of any size. They are products of ones with the three bfloat16
  that make a float32.
  """
  logs = rest = steps.load_row(ref.decay)
  size = plan.blocks.chunk
  row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  later = (row > lane).astype(jnp.float32).astype(jnp.bfloat16)
  between = 0.0
  for _ in range(3):
    part = rest.astype(jnp.bfloat16).astype(jnp.float32)
    rest = rest - part
    part = jnp.where(row >= lane, part, 0.0).astype(jnp.bfloat16)
    between = between + dot(part, later, NN)
  pairs = jnp.exp2(between)
  ref.pairs[steps.index] = pairs
  ref.before[steps.index] = jnp.broadcast_to(
      pairs[:, :1] * jnp.exp2(logs[:, :1]), (size, LANES))
  if ref.after is not None:
    ref.after[steps.index] = jnp.broadcast_to(pairs[-1:], (LANES, size)).T


def causal(shape):
  query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  key = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
  return key <= query


def weights(q, k, decays):
  """W [G,C,C], of q [G,C,H] and k [C,H]."""
  W = dot(flat(q), k, NT).reshape(*q.shape[:2], -1)
  if decays is not None:
    W *= decays.pairs
  return jnp.where(causal(W.shape), W, 0.0)


def denominator(plan, q, W, z, decays):
  """[G,C,1]."""
  carried = q.astype(jnp.float32) * z
  if decays is not None:
    carried = decays.from_state(carried)
  return row_sums(W, carried) + plan.rule.normalize


def row_sums(x, y):
  """Sums [G,C,1] over the rows of both: across lanes once if they can."""
  if x.shape == y.shape:
    return jnp.sum(x + y, axis=-1, keepdims=True)
  return (jnp.sum(x, axis=-1, keepdims=True)
          + jnp.sum(y, axis=-1, keepdims=True))


def update(plan, k, v, decays):
  """What a chunk adds to S, and to z, None without a normaliser."""
  ones = jnp.ones((1, len(k)), jnp.float32)
  transposed = k.T
  if decays is not None:
    ones = decays.after
    transposed = transposed.astype(jnp.float32) * decays.after
    transposed = transposed.astype(k.dtype)
  S, z = dot(transposed, v, NN), None
  if plan.rule.normalize is not None:
    z = dot(ones.astype(k.dtype), k, NN)
  return S, z


def kept(state, decays):
  """What a chunk leaves of a state."""
  return state if decays is None else state * decays.all
