"""Linear attention in chunks, in plain jnp: matrix products over a scan.

Within a chunk every query meets every key, as in the quadratic form; what came
before the chunk is in its state. Forward keeps the state before each chunk,
backward takes the chunks in reverse and differentiates one at a time.

Chunks are laid out [B, K, C, ...], queries [B, K, G, C, H], so that each
product is one batched matrix product without a transpose.
"""

import jax
import jax.numpy as jnp

from attention.kernels import chunked

# On a CPU 64 steps take about a tenth more time at H = V = 64, and more at 128:
# the pairs of a chunk cost more than its state.
CHUNK = 32


def check(operands, starts, *, normalize):
  """Everything is supported."""
  del operands, starts, normalize


def forward(operands, starts, *, normalize):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, z0 = operands

  def step(state, inputs):
    inputs, starts = inputs
    after, y = _chunk(state, inputs, starts, normalize)
    return after, (y, state)

  inputs = _inputs(q, k, v, decay), _split(starts, features=0)
  (sT, zT), (y, states) = jax.lax.scan(step, _float32((s0, z0)), inputs)
  y = jnp.moveaxis(y, (0, -2), (1, 2))
  y = y.reshape(y.shape[0], -1, *q.shape[2:-1], v.shape[-1])
  return y[:, :q.shape[1]].astype(v.dtype), sT, zT, states


def backward(operands, starts, states, dy, dsT, dzT, *, normalize):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, _, _ = operands

  def step(dstate, inputs):
    state, inputs, starts, dy = inputs
    _, pull = jax.vjp(
        lambda state, inputs: _chunk(state, inputs, starts, normalize),
        state, inputs)
    return pull((dstate, dy.astype(jnp.float32)))

  inputs, pull_inputs = jax.vjp(_inputs, q, k, v, decay)
  dy = _split(_grouped(dy, k.shape[2]), features=1)
  starts = _split(starts, features=0)
  (ds0, dz0), dinputs = jax.lax.scan(
      step, _float32((dsT, dzT)), (states, inputs, starts, dy), reverse=True)
  return chunked.Operands(*pull_inputs(dinputs), ds0, dz0)


def _chunk(state, inputs, starts, normalize):
  """One chunk: the state after it, and its outputs."""
  S, z = state
  q, k, v, decay = _float32(inputs)
  steps = k.shape[-2]
  pairs, from_state, to_end = _visible(starts, steps)

  weights = jnp.einsum('BKGTH,BKSH->BKGTS', q, k)
  weights = jnp.where(pairs[:, None, None], weights, 0.0)
  k_kept = jnp.where(to_end[:, None, :, None], k, 0.0)
  S_kept = S
  if decay is not None:
    within, before = _decays(decay)
    weights = weights * within[:, :, None]
    q = q * before[:, :, None, :, None]
    k_kept = k_kept * within[:, :, -1, :, None]
    S_kept = S * before[:, :, -1, None, None]
  carried = jnp.einsum('BKGTH,BKHV->BKGTV', q, S)
  carried = jnp.where(from_state[:, None, None, :, None], carried, 0.0)
  y = jnp.einsum('BKGTS,BKSV->BKGTV', weights, v) + carried
  survives = from_state[:, -1, None, None]
  S = (jnp.where(survives[..., None], S_kept, 0.0)
       + jnp.einsum('BKSH,BKSV->BKHV', k_kept, v))
  if normalize is None:
    return (S, None), y

  carried = jnp.einsum('BKGTH,BKH->BKGT', q, z)
  carried = jnp.where(from_state[:, None, None], carried, 0.0)
  # The reciprocal first: its gradient takes one division a row.
  y = y * (1 / (weights.sum(-1) + carried + normalize))[..., None]
  z_kept = z if decay is None else z * before[:, :, -1, None]
  z = jnp.where(survives, z_kept, 0.0) + k_kept.sum(-2)
  return (S, z), y


def _visible(starts, steps):
  """Which pairs meet, which steps see the state, which the state after sees."""
  if starts is None:
    document = jnp.zeros((1, steps), int)
  else:
    document = jnp.cumsum(starts, axis=1)
  causal = jnp.tril(jnp.ones((steps, steps), bool))
  pairs = causal & (document[:, :, None] == document[:, None, :])
  return pairs, document == 0, document == document[:, -1:]


def _decays(decay):
  """Decay from step s to t, [B, K, T, S], and from the state to t, [B, K, T].

  Sums of log decays, never differences of sums: they are <= 0 however they
  round, and exact beside a decay of any size. As products with a triangle of
  ones: on a CPU these are cheaper than cumulative sums.
  """
  # A product has no room for 0 * inf; exp of this is 0 just the same.
  decay = jnp.maximum(decay, -1e30)
  steps = decay.shape[-1]
  until = jnp.tril(jnp.ones((steps, steps)))
  later = jnp.tril(jnp.ones((steps, steps), bool), -1)
  within = jnp.einsum(
      'TU,BKUS->BKTS', until, jnp.where(later, decay[..., None], 0.0),
      precision='highest')
  before = jnp.einsum('TU,BKU->BKT', until, decay, precision='highest')
  return jnp.exp(within), jnp.exp(before)


def _inputs(q, k, v, decay):
  q = _grouped(q, k.shape[2])
  return (_split(q, features=1), _split(k, features=1), _split(v, features=1),
          _split(decay, features=0))


def _grouped(q, groups):
  return q.reshape(*q.shape[:2], groups, -1, q.shape[-1])


def _split(array, *, features):
  """[B, T, ...] to [chunks, B, ..., C, features], filled up with zeros.

  A key of zero and a log decay of zero leave the state as it is.
  """
  if array is None:
    return None
  time = array.shape[1]
  # As even as they can be: 100 steps are four chunks of 25, not 3 of 32 and 4.
  number = -(-time // CHUNK)
  steps = -(-time // number)
  fill = [(0, 0)] * array.ndim
  fill[1] = (0, number * steps - time)
  array = jnp.pad(array, fill)
  array = array.reshape(array.shape[0], number, steps, *array.shape[2:])
  return jnp.moveaxis(array, (1, 2), (0, -1 - features))


def _float32(tree):
  return jax.tree.map(lambda array: array.astype(jnp.float32), tree)
