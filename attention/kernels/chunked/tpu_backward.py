"""The backward TPU kernel of chunked linear attention.

Blocks are taken in reverse, dS and dz in VMEM. The states before each chunk of
a block are computed again from the one that the forward kernel saved before
the block; then each chunk yields all of its gradients. What the forward kernel
did not write, the weights and denominators, is computed again too.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.chunked import tpu_blocks, tpu_chunk
from attention.kernels.chunked.tpu_chunk import decays_of, flat, kept
from attention.kernels.tpu_tiles import NN, NT, TN, dot


def kernel(r, spec):
  """See `tpu.backward`, which names the refs."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    r.dS[...] = r.dsT[...]
    if r.z is not None:
      r.dz[...] = r.dzT[...]

  def visit(piece, fresh):
    first = 0 if piece is None else tpu_chunk.quotient(piece[0], spec.chunk)
    S, z = r.S.at[first], None if r.z is None else r.z.at[first]
    S[...] = r.Ss[...]
    if z is not None:
      z[...] = r.zs[...]
    tpu_chunk.clear(fresh, S, z)
    if r.decay is not None:
      tpu_chunk.each_chunk(r, spec, piece, [tpu_chunk.write_decays])
    # The state after the last chunk of a block is not asked for.
    if spec.chunks > 1:
      tpu_chunk.each_chunk(r, spec, piece, [_start_states, _finish_states])
    tpu_chunk.each_chunk(
        r, spec, piece, [_start_backward, _weigh_backward, _finish_backward],
        reverse=True)
    tpu_chunk.clear(fresh, r.dS, r.dz)

  tpu_blocks.walk(spec, r.pieces, visit, reverse=True)

  @pl.when(pl.program_id(2) == spec.blocks - 1)
  def _():
    r.ds0[...] = r.dS[...]
    if r.z is not None:
      r.dz0[...] = r.dz[...]


def _start_states(r, spec, chunk):
  """What a chunk adds to the states."""
  k, v = chunk.load(r.k), chunk.load(r.v)
  decays = decays_of(r, chunk)
  return decays, tpu_chunk.update(k, v, decays, spec.eps)


def _finish_states(r, spec, chunk, decays, update):
  """Writes the states after a chunk, but for the last of the block."""
  after = chunk.index + 1

  def write():
    for states, added in zip((r.S, r.z), update):
      if states is not None:
        states[after] = kept(states[chunk.index], decays) + added

  if not isinstance(after, int):
    pl.when(after < spec.chunks)(write)
  elif after < spec.chunks:
    write()


def _start_backward(r, spec, chunk):
  """The products of a chunk that depend on its inputs alone."""
  q, k, v, dy = (chunk.load(ref) for ref in (r.q, r.k, r.v, r.dy))
  S, decays = r.S[chunk.index], decays_of(r, chunk)
  W = tpu_chunk.weights(q, k, decays)
  dW = dot(flat(dy), v, NT).reshape(W.shape)
  dq = dot(flat(dy), S.astype(q.dtype), NT).reshape(q.shape)
  if decays is not None:
    dq = decays.from_state(dq)
  inverse = None
  if r.z is not None:
    inverse = 1 / tpu_chunk.denominator(
        q, W, r.z[chunk.index], decays, spec.eps)
  return W, dW, dq, inverse


def _weigh_backward(r, spec, chunk, W, dW, dq, inverse):
  """Gradients of the weights, of the state's share of y and of z.

  dn is the gradient of the numerator of y, -m that of the denominator.
  """
  q, dn = chunk.load(r.q), chunk.load(r.dy)
  decays = decays_of(r, chunk)
  dtype = q.dtype
  dz = None
  if r.z is not None:
    wide_q = q.astype(jnp.float32)
    dn = (dn.astype(jnp.float32) * inverse).astype(dtype)
    dW *= inverse
    dq *= inverse
    m = inverse * tpu_chunk.row_sums(W * dW, wide_q * dq)
    dW -= m
    mq, mz = m * wide_q, m * r.z[chunk.index]
    if decays is not None:
      mq, mz = decays.from_state(mq), decays.from_state(mz)
    dq -= mz
    dz = -jnp.sum(flat(mq), axis=0, keepdims=True)
  dW = jnp.where(tpu_chunk.causal(W.shape), dW, 0.0)
  ddecay = None
  if decays is not None:
    ddecay = _decay_gradient(
        jnp.sum(W * dW, axis=0),
        jnp.sum(jnp.sum(q.astype(jnp.float32) * dq, axis=0), axis=-1,
                keepdims=True), dtype)
    dW *= decays.pairs
  return W.astype(dtype), dW.astype(dtype), dq, dn, dz, ddecay


def _finish_backward(r, spec, chunk, W, dW, dq, dn, dz, ddecay):
  """Writes the gradients of a chunk and takes dS and dz back over it."""
  del spec
  q, k, v = (chunk.load(ref) for ref in (r.q, r.k, r.v))
  decays = decays_of(r, chunk)
  dS = r.dS[...]
  half = dS.astype(k.dtype)
  dk = dot(v, half, NT)
  dv = dot(k, half, NN)
  dn_before = dn
  if r.z is not None:
    dk += r.dz[...]
  if decays is not None:
    dk, dv = decays.to_state(dk), decays.to_state(dv)
    dn_before = decays.from_state(dn.astype(jnp.float32)).astype(dn.dtype)
    through = jnp.sum(kept(dS, decays) * r.S[chunk.index], keepdims=True)
    if r.z is not None:
      through += jnp.sum(
          kept(r.dz[...], decays) * r.z[chunk.index], keepdims=True)
    after = jnp.sum(k.astype(jnp.float32) * dk, axis=-1, keepdims=True)
    chunk.store_row(r.ddecay, ddecay + _earlier(after) + through)
  W, dW, dn = flat(W), flat(dW), flat(dn)
  chunk.store(r.dq, dq + dot(dW, k, NN).reshape(dq.shape))
  chunk.store(r.dk, dk + dot(dW, flat(q), TN))
  chunk.store(r.dv, dv + dot(W, dn, TN))
  r.dS[...] = kept(dS, decays) + dot(flat(q), flat(dn_before), TN)
  if r.z is not None:
    r.dz[...] = kept(r.dz[...], decays) + dz


def _decay_gradient(pairs, before, dtype):
  """Gradient [1,C] of a chunk's decays, but for those of the state after.

  A decay is in the weight of each pair that it lies between, and in that of
  the state for its own and later steps: sums over exactly those.

  Args:
    pairs: [C,C], gradients of the logarithms of `tpu_chunk.Decays.pairs`.
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
