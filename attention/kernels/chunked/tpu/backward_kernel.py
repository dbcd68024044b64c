"""The backward TPU kernel of chunked linear attention: blocks in reverse."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.chunked.tpu import blocks, chunk
from attention.kernels.chunked.tpu.chunk import flat, kept
from attention.kernels.mosaic_tpu import NN, NT, TN, copy, dot


def kernel(ref, plan):
  """The gradients of one block, and of the states before it."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    copy((ref.dsT, ref.dS), (ref.dzT, ref.dz))

  def visit(segment, fresh):
    first = 0
    if segment is not None:
      first = chunk.quotient(segment[0], plan.blocks.chunk)
    S, z = ref.every_S.at[first], None
    if ref.every_z is not None:
      z = ref.every_z.at[first]
    copy((ref.saved_S, S), (ref.saved_z, z))
    chunk.clear(fresh, S, z)
    if ref.decay is not None:
      chunk.each_chunk(ref, plan, segment, [chunk.write_decays])
    # The state after the last chunk of a block is not asked for.
    if plan.blocks.chunks > 1:
      chunk.each_chunk(ref, plan, segment, [_start_states, _finish_states])
    chunk.each_chunk(
        ref, plan, segment, [_start, _weigh, _finish], backward=True)
    chunk.clear(fresh, ref.dS, ref.dz)

  blocks.walk(plan, ref.segments, visit, backward=True)

  @pl.when(pl.program_id(2) == plan.n_blocks - 1)
  def _():
    copy((ref.dS, ref.ds0), (ref.dz, ref.dz0))


def _start_states(ref, plan, steps):
  """What a chunk adds to the states."""
  k, v = steps.load(ref.k), steps.load(ref.v)
  decays = chunk.decays_of(ref, steps)
  return decays, chunk.update(plan, k, v, decays)


def _finish_states(ref, plan, steps, decays, update):
  """Writes the states after a chunk, but for the last of the block."""
  after = steps.index + 1

  def write():
    for states, added in zip((ref.every_S, ref.every_z), update):
      if states is not None:
        states[after] = kept(states[steps.index], decays) + added

  if not isinstance(after, int):
    pl.when(after < plan.blocks.chunks)(write)
  elif after < plan.blocks.chunks:
    write()


def _start(ref, plan, steps):
  """The products of a chunk that depend on its inputs alone."""
  q, k, v, dy = (steps.load(x) for x in (ref.q, ref.k, ref.v, ref.dy))
  S, decays = ref.every_S[steps.index], chunk.decays_of(ref, steps)
  W = chunk.weights(q, k, decays)
  dW = dot(flat(dy), v, NT).reshape(W.shape)
  dq = dot(flat(dy), S.astype(q.dtype), NT).reshape(q.shape)
  if decays is not None:
    dq = decays.from_state(dq)
  inverse = None
  if ref.every_z is not None:
    inverse = 1 / chunk.denominator(
        plan, q, W, ref.every_z[steps.index], decays)
  return W, dW, dq, inverse


def _weigh(ref, plan, steps, W, dW, dq, inverse):
  """Gradients of the weights, of the state's share of y and of z.

  dn is the gradient of the numerator of y, -m that of the denominator.
  """
  q, dn = steps.load(ref.q), steps.load(ref.dy)
  decays = chunk.decays_of(ref, steps)
  dtype = q.dtype
  dz = None
  if ref.every_z is not None:
    wide_q = q.astype(jnp.float32)
    dn = (dn.astype(jnp.float32) * inverse).astype(dtype)
    dW *= inverse
    dq *= inverse
    m = inverse * chunk.row_sums(W * dW, wide_q * dq)
    dW -= m
    mq, mz = m * wide_q, m * ref.every_z[steps.index]
    if decays is not None:
      mq, mz = decays.from_state(mq), decays.from_state(mz)
    dq -= mz
    dz = -jnp.sum(flat(mq), axis=0, keepdims=True)
  dW = jnp.where(chunk.causal(W.shape), dW, 0.0)
  ddecay = None
  if decays is not None:
    ddecay = _decay_gradient(
        jnp.sum(W * dW, axis=0),
        jnp.sum(jnp.sum(q.astype(jnp.float32) * dq, axis=0), axis=-1,
                keepdims=True), dtype)
    dW *= decays.pairs
  return W.astype(dtype), dW.astype(dtype), dq, dn, dz, ddecay


def _finish(ref, plan, steps, W, dW, dq, dn, dz, ddecay):
  """Writes the gradients of a chunk and takes dS and dz back over it."""
  del plan
  q, k, v = (steps.load(x) for x in (ref.q, ref.k, ref.v))
  decays = chunk.decays_of(ref, steps)
  dS = ref.dS[...]
  rounded = dS.astype(k.dtype)
  dk = dot(v, rounded, NT)
  dv = dot(k, rounded, NN)
  dn_before = dn
  if ref.every_z is not None:
    dk += ref.dz[...]
  if decays is not None:
    dk, dv = decays.to_state(dk), decays.to_state(dv)
    dn_before = decays.from_state(dn.astype(jnp.float32)).astype(dn.dtype)
    through = jnp.sum(
        kept(dS, decays) * ref.every_S[steps.index], keepdims=True)
    if ref.every_z is not None:
      through += jnp.sum(
          kept(ref.dz[...], decays) * ref.every_z[steps.index], keepdims=True)
    after = jnp.sum(k.astype(jnp.float32) * dk, axis=-1, keepdims=True)
    steps.store_row(ref.ddecay, ddecay + _earlier(after) + through)
  W, dW, dn = flat(W), flat(dW), flat(dn)
  steps.store(ref.dq, dq + dot(dW, k, NN).reshape(dq.shape))
  steps.store(ref.dk, dk + dot(dW, flat(q), TN))
  steps.store(ref.dv, dv + dot(W, dn, TN))
  ref.dS[...] = kept(dS, decays) + dot(flat(q), flat(dn_before), TN)
  if ref.every_z is not None:
    ref.dz[...] = kept(ref.dz[...], decays) + dz


def _decay_gradient(pairs, before, dtype):
  """Gradient [1,C] of a chunk's decays, but for those of the state after.

  A decay is in the weight of each pair that it lies between, and in that of
  the state for its own and later steps: sums over exactly those.

  Args:
    pairs: [C,C], gradients of the logarithms of `chunk.Decays.pairs`.
    before: [C,1], likewise.
    dtype: of the product.
  """
  earlier = _earlier_steps(len(pairs))
  ones = earlier.astype(jnp.float32).astype(dtype)
  crossing = dot(pairs.astype(dtype), ones, NN)
  return jnp.sum(jnp.where(earlier, 0.0, crossing + before), axis=0,
                 keepdims=True)


def _earlier_steps(steps):
  """[C,C], whether row s is earlier than column t."""
  shape = steps, steps
  return (jax.lax.broadcasted_iota(jnp.int32, shape, 0)
          < jax.lax.broadcasted_iota(jnp.int32, shape, 1))


def _earlier(x):
  """Sums [1,C] of a column [C,1] over the steps before each."""
  return jnp.sum(jnp.where(_earlier_steps(len(x)), x, 0.0), axis=0,
                 keepdims=True)
