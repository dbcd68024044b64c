"""The delta rule as it is defined: one step at a time, in float32."""

import jax
import jax.numpy as jnp


def delta_rule(q, k, v, *, beta=None, decay=None, s0=None, starts=None):
  """`attention.kernels.delta.delta_rule`, step by step."""
  dtype = v.dtype
  q, k, v = (array.astype(jnp.float32) for array in (q, k, v))
  batch, time, groups, width = k.shape
  q = q.reshape(batch, time, groups, -1, width)
  S = jnp.zeros((batch, groups, width, v.shape[-1])) if s0 is None else s0
  if decay is None:
    decay = jnp.zeros((batch, time, groups))
  if decay.ndim == 3:
    decay = decay[..., None]
  if starts is None:
    starts = jnp.zeros((batch, time), bool)

  def step(S, inputs):
    q, k, v, beta, decay, start = inputs
    S = jnp.where(start[:, None, None, None], 0.0, S)
    S = jnp.exp(decay.astype(jnp.float32))[..., None] * S
    if beta is not None:
      v = beta[..., None] * (v - _einsum('BKH,BKHV->BKV', k, S))
    S = S + k[..., :, None] * v[..., None, :]
    return S, _einsum('BKGH,BKHV->BKGV', q, S)

  inputs = (q, k, v, beta, decay, starts)
  time_first = jax.tree.map(lambda array: array.swapaxes(0, 1), inputs)
  S, y = jax.lax.scan(step, S.astype(jnp.float32), time_first)
  y = y.swapaxes(0, 1).reshape(batch, time, -1, v.shape[-1])
  return y.astype(dtype), S


def _einsum(equation, *operands):
  # Float32 products on matrix units too; a CPU knows no others.
  return jnp.einsum(equation, *operands, precision='highest')
