"""A chunk of the TPU kernels of chunked linear attention: what both share.

Refs come in a namespace r, by the names that `tpu` gives them, None where the
call has no such array; W, D, a, b, e are those of the equations there.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.tpu_tiles import NN, NT, dot

LANES = 128


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


def each_chunk(r, spec, piece, stages, *, distance=1, reverse=False):
  """Takes the chunks that a piece has steps in through stages, in order.

  A stage is called with r, spec, a Chunk and what the stage before returned.
  In a whole block, a stage is `distance` chunks behind the stage before: while
  one waits for its products, the matrix unit has those of the other.
  """
  if piece is None:
    order = [Chunk(spec, c, None) for c in range(spec.chunks)]
    if reverse:
      order.reverse()
    results = [()] * len(order)
    for turn in range(len(order) + distance * (len(stages) - 1)):
      for n, stage in reversed(list(enumerate(stages))):
        at = turn - n * distance
        if 0 <= at < len(order):
          results[at] = stage(r, spec, order[at], *(results[at] or ()))
    return

  def through(index):
    result = ()
    for stage in stages:
      result = stage(r, spec, Chunk(spec, index, piece), *(result or ()))

  if spec.chunks == 1:
    through(0)
    return
  first = quotient(piece[0], spec.chunk)
  end = quotient(piece[1] + spec.chunk - 1, spec.chunk)
  jax.lax.fori_loop(
      first, end, lambda n, _: through(first + end - 1 - n if reverse else n),
      None)


class Chunk:
  """The steps of a chunk that belong to a piece: how they load and store."""

  def __init__(self, spec, index, piece):
    self.index = index
    self.start = index * spec.chunk
    if not isinstance(index, int):
      self.start = pl.multiple_of(self.start, spec.chunk)
    self.rows = pl.ds(self.start, spec.chunk)
    self.piece = piece

  def _inside(self, shape, axis):
    step = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + self.start
    return (step >= self.piece[0]) & (step < self.piece[1])

  def load(self, ref):
    """[..., C, width] of a ref of the block, zero outside the piece."""
    x = ref[..., self.rows, :]
    if self.piece is None:
      return x
    inside = self._inside(x.shape, x.ndim - 2)
    return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)

  def store(self, ref, x):
    """Writes the steps inside the piece."""
    if self.piece is not None:
      old = ref[..., self.rows, :].astype(jnp.float32)
      x = jnp.where(self._inside(x.shape, x.ndim - 2), x, old)
    ref[..., self.rows, :] = x.astype(ref.dtype)

  def load_row(self, ref):
    """[1,C] of a ref of the block, zero outside the piece."""
    x = ref[:, self.rows]
    return x if self.piece is None else jnp.where(
        self._inside(x.shape, 1), x, 0.0)

  def store_row(self, ref, x):
    """Writes the lanes [1,C] inside the piece."""
    if self.piece is not None:
      x = jnp.where(self._inside(x.shape, 1), x, ref[:, self.rows])
    ref[:, self.rows] = x


def decay_scratch(spec, decay, *, after):
  """Shapes of what `write_decays` writes, by name: None without decays.

  Args:
    spec: tpu_blocks.Spec.
    decay: the op's argument.
    after: whether `Decays.to_state` is called.
  """
  shapes = dict(pairs=(spec.chunks, spec.chunk, spec.chunk),
                before=(spec.chunks, spec.chunk, LANES),
                after=(spec.chunks, spec.chunk, LANES) if after else None)
  return shapes if decay is not None else dict.fromkeys(shapes)


class Decays:
  """Decays of a chunk that `write_decays` left.

  Attributes:
    pairs: [C,C], from step s to step t, where s <= t: exp of a sum of logs over
      exactly the steps between.
    after: [1,C], from step s to the state after the chunk.
    all: [1,1], from the state before to the state after.
  """

  def __init__(self, r, chunk):
    self._before, self._after = r.before, r.after
    self._index = chunk.index
    self.pairs = r.pairs[chunk.index]
    self.after = self.pairs[-1:]
    self.all = r.before[chunk.index, -1:, :1]

  def from_state(self, x):
    """[...,C,width] times the decay from the state before the chunk."""
    return x * _columns(self._before[self._index], x.shape[-1])

  def to_state(self, x):
    """[C,width] times the decay to the state after the chunk."""
    return x * _columns(self._after[self._index], x.shape[-1])


def _columns(x, width):
  """[C,128], whose lanes are equal, as [C,width]."""
  return jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)[:, :width]


def decays_of(r, chunk):
  """Decays of a chunk, None without."""
  return None if r.decay is None else Decays(r, chunk)


def write_decays(r, spec, chunk):
  """Writes the decays of a chunk.

  Nothing is subtracted: sums of logs are <= 0 however they round, and exact
  beside a decay of any size. They are products of ones with the three bfloat16
  that make a float32.
  """
  logs = rest = chunk.load_row(r.decay)
  steps = spec.chunk
  row = jax.lax.broadcasted_iota(jnp.int32, (steps, steps), 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (steps, steps), 1)
  later = (row > lane).astype(jnp.float32).astype(jnp.bfloat16)
  between = 0.0
  for _ in range(3):
    part = rest.astype(jnp.bfloat16).astype(jnp.float32)
    rest = rest - part
    part = jnp.where(row >= lane, part, 0.0).astype(jnp.bfloat16)
    between = between + dot(part, later, NN)
  pairs = jnp.exp2(between)
  r.pairs[chunk.index] = pairs
  r.before[chunk.index] = jnp.broadcast_to(
      pairs[:, :1] * jnp.exp2(logs[:, :1]), (steps, LANES))
  if r.after is not None:
    r.after[chunk.index] = jnp.broadcast_to(pairs[-1:], (LANES, steps)).T


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


def denominator(q, W, z, decays, eps):
  """[G,C,1]."""
  carried = q.astype(jnp.float32) * z
  if decays is not None:
    carried = decays.from_state(carried)
  return row_sums(W, carried) + eps


def row_sums(x, y):
  """Sums [G,C,1] over the rows of both: across lanes once if they can."""
  if x.shape == y.shape:
    return jnp.sum(x + y, axis=-1, keepdims=True)
  return (jnp.sum(x, axis=-1, keepdims=True)
          + jnp.sum(y, axis=-1, keepdims=True))


def update(k, v, decays, eps):
  """What a chunk adds to S, and to z, None without a normaliser."""
  ones = jnp.ones((1, len(k)), jnp.float32)
  turned = k.T
  if decays is not None:
    ones = decays.after
    turned = (turned.astype(jnp.float32) * decays.after).astype(k.dtype)
  return dot(turned, v, NN), (
      None if eps is None else dot(ones.astype(k.dtype), k, NN))


def kept(state, decays):
  """What a chunk leaves of a state."""
  return state if decays is None else state * decays.all
