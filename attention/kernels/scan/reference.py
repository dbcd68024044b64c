"""The selective scan as it is defined: one step at a time, in float32."""

import jax
import jax.numpy as jnp


def selective_scan(x, dt, A, B, C, D, *, z=None, dt_bias=None,
                   dt_softplus=True, scale_input=True, h0=None, starts=None):
  """`attention.kernels.scan.selective_scan`, argument for argument."""
  dtype = x.dtype
  x, dt, A, B, C, D = (
      array.astype(jnp.float32) for array in (x, dt, A, B, C, D))
  if dt_bias is not None:
    dt = dt + dt_bias.astype(jnp.float32)
  delta = jax.nn.softplus(dt) if dt_softplus else dt
  u = delta * x if scale_input else x
  h = jnp.zeros((x.shape[0], *A.shape)) if h0 is None else h0
  if starts is None:
    starts = jnp.zeros(x.shape[:2], bool)

  def step(h, inputs):
    u, delta, B, C, start = inputs
    h = jnp.where(start[:, None, None], 0.0, h)
    h = (jnp.exp(delta[:, :, None] * A) * h
         + u[:, :, None] * B[:, None, :])
    return h, (h * C[:, None, :]).sum(-1)

  inputs = (u, delta, B, C, starts)
  time_first = jax.tree.map(lambda array: array.swapaxes(0, 1), inputs)
  h, y = jax.lax.scan(step, h.astype(jnp.float32), time_first)
  y = y.swapaxes(0, 1) + D * x
  if z is not None:
    y = y * jax.nn.silu(z.astype(jnp.float32))
  return y.astype(dtype), h
