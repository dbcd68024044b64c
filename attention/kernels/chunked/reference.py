"""Linear attention as it is defined: one step at a time, in float32."""

import jax
import jax.numpy as jnp


def chunked_linear_attention(q, k, v, *, decay=None, s0=None,
                             starts=None, normalize=None):
  """`attention.kernels.chunked.chunked_linear_attention`, step by step."""
  dtype = v.dtype
  q, k, v = (array.astype(jnp.float32) for array in (q, k, v))
  batch, time, states, _ = v.shape
  S = jnp.zeros((batch, states, k.shape[-1], v.shape[-1]))
  z = jnp.zeros((batch, states, k.shape[-1]))
  if s0 is not None:
    S, z = s0 if normalize is not None else (s0, z)
  decay = jnp.zeros(states) if decay is None else decay.astype(jnp.float32)
  decay = jnp.broadcast_to(decay, (batch, time, states))
  if starts is None:
    starts = jnp.zeros((batch, time), bool)

  def of_states(x):
    """[B,heads,H], heads for several states repeated."""
    return jnp.repeat(x, max(states // x.shape[1], 1), axis=1)

  def step(state, inputs):
    S, z = state
    q, k, v, decay, start = inputs
    k = of_states(k)
    q = of_states(q).reshape(batch, states, -1, k.shape[-1])
    S = jnp.where(start[:, None, None, None], 0.0, S)
    z = jnp.where(start[:, None, None], 0.0, z)
    kept = jnp.exp(decay)
    S = kept[..., None, None] * S + k[..., :, None] * v[..., None, :]
    z = kept[..., None] * z + k
    y = jnp.einsum('BKGH,BKHV->BKGV', q, S, precision='highest')
    if normalize is not None:
      denominator = jnp.einsum('BKGH,BKH->BKG', q, z, precision='highest')
      y = y / (denominator[..., None] + normalize)
    return (S, z), y

  inputs = (q, k, v, decay, starts)
  time_first = jax.tree.map(lambda array: array.swapaxes(0, 1), inputs)
  (S, z), y = jax.lax.scan(step, (S, z), time_first)
  y = y.swapaxes(0, 1).reshape(batch, time, -1, v.shape[-1])
  return y.astype(dtype), (S if normalize is None else (S, z))
