"""The forward TPU kernel of chunked linear attention."""

from jax.experimental import pallas as pl

from attention.kernels.chunked.tpu import blocks, chunk
from attention.kernels.chunked.tpu.chunk import flat, kept
from attention.kernels.mosaic_tpu import NN, copy, dot


def kernel(ref, plan):
  """The outputs of one block, and the states that it started from."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    copy((ref.s0, ref.S), (ref.z0, ref.z))

  copy((ref.S, ref.saved_S), (ref.z, ref.saved_z))

  def visit(segment, fresh):
    chunk.clear(fresh, ref.S, ref.z)
    if ref.decay is not None:
      chunk.each_chunk(ref, plan, segment, [chunk.write_decays])
    chunk.each_chunk(ref, plan, segment, [_start, _finish], distance=2)

  blocks.walk(plan, ref.segments, visit)

  @pl.when(pl.program_id(2) == plan.n_blocks - 1)
  def _():
    copy((ref.S, ref.sT), (ref.z, ref.zT))


def _start(ref, plan, steps):
  """The weights of a chunk, and what it adds to the states."""
  q, k, v = steps.load(ref.q), steps.load(ref.k), steps.load(ref.v)
  decays = chunk.decays_of(ref, steps)
  return chunk.weights(q, k, decays), chunk.update(plan, k, v, decays)


def _finish(ref, plan, steps, W, update):
  """Writes y of a chunk and takes S and z over it."""
  q, v = steps.load(ref.q), steps.load(ref.v)
  decays = chunk.decays_of(ref, steps)
  carried = dot(flat(q), ref.S[...].astype(q.dtype), NN)
  carried = carried.reshape(*q.shape[:2], -1)
  if decays is not None:
    carried = decays.from_state(carried)
  y = carried + dot(flat(W.astype(v.dtype)), v, NN).reshape(carried.shape)
  if ref.z is not None:
    y *= 1 / chunk.denominator(plan, q, W, ref.z[...], decays)
  steps.store(ref.y, y)
  for state, added in zip((ref.S, ref.z), update):
    if state is not None:
      state[...] = kept(state[...], decays) + added
