"""Selective scan in plain jnp: one step at a time, chunk by chunk.

The forward pass keeps the state before each chunk. The backward pass takes the
chunks in reverse, recomputes the states of one chunk, and walks back through
it. A chunk of states fits the cache, and nothing of B T E M elements exists.
On a CPU this is several times faster than associative scans, whole or inside
chunks: those do more arithmetic and go through memory at each of their levels.

The state is laid out [B, M, E]: channels last, so that every step is one
vector operation over E, with B_t and C_t broadcast.
"""

import jax
import jax.numpy as jnp

from attention.kernels import scan

CHUNK = 32


def check(operands, starts, *, dt_softplus):
  """Everything is supported."""
  del operands, starts, dt_softplus


def forward(operands, starts, *, dt_softplus):
  """See `attention.kernels.scan`."""
  x, dt, A, B, C, D, z, dt_bias, h0 = operands
  delta = _step_sizes(dt, dt_bias, dt_softplus)
  A, h = A.astype(jnp.float32).T, h0.astype(jnp.float32).swapaxes(1, 2)

  def step(h, inputs):
    x, delta, B, C, start = inputs
    h, _ = _step(h, x, delta, A, B, start)
    return h, _einsum('BME,BM->BE', h, C)

  def chunk(h, inputs):
    last, s = jax.lax.scan(step, h, inputs)
    return last, (s, h)

  inputs = _chunks((x, delta, B, C, starts))
  h, (s, states) = jax.lax.scan(chunk, h, inputs)
  y = _output(_unchunk(s, x.shape[1]), x, D, z).astype(x.dtype)
  return y, h.swapaxes(1, 2), states


def backward(operands, starts, states, dy, dhT, *, dt_softplus):
  """See `attention.kernels.scan`."""
  x, dt, A, B, C, D, z, dt_bias, h0 = operands
  delta, pull_delta = jax.vjp(
      lambda dt, dt_bias: _step_sizes(dt, dt_bias, dt_softplus), dt, dt_bias)
  dy = dy.astype(jnp.float32)
  ds = dy if z is None else dy * jax.nn.silu(z.astype(jnp.float32))
  A = A.astype(jnp.float32).T

  def again(h, inputs):
    x, delta, B, C, start, _ = inputs
    h, kept = _step(h, x, delta, A, B, start)
    return h, (kept, None if z is None else _einsum('BME,BM->BE', h, C))

  def back(carry, inputs):
    dh, dA = carry
    (x, delta, B, C, start, ds), kept = inputs
    dh = dh + ds[:, None, :] * C[:, :, None]
    h = kept + (delta * x)[:, None, :] * B[:, :, None]
    dkept = dh * kept
    du = _einsum('BME,BM->BE', dh, B)
    dx, ddelta = delta * du, x * du + (dkept * A).sum(1)
    dB = _einsum('BME,BE->BM', dh, delta * x)
    dC = _einsum('BME,BE->BM', h, ds)
    dA = dA + dkept * delta[:, None, :]
    dh = jnp.exp(delta[:, None, :] * A) * dh
    if start is not None:
      dh = jnp.where(start[:, None, None], 0.0, dh)
    return (dh, dA), (dx, ddelta, dB, dC)

  def chunk(carry, inputs):
    h, inputs = inputs
    _, (kept, s) = jax.lax.scan(again, h, inputs)
    carry, gradients = jax.lax.scan(
        back, carry, (inputs, kept), reverse=True)
    return carry, (*gradients, s)

  # dA is summed over the batch at the end: cheaper than at every step.
  dhT = dhT.astype(jnp.float32).swapaxes(1, 2)
  carry = (dhT, jnp.zeros_like(dhT))
  inputs = (states, _chunks((x, delta, B, C, starts, ds)))
  (dh0, dA), outputs = jax.lax.scan(chunk, carry, inputs, reverse=True)
  dx, ddelta, dB, dC, s = jax.tree.map(
      lambda array: _unchunk(array, x.shape[1]), outputs)
  if s is None:
    s = jnp.zeros_like(ds)
  _, pull_output = jax.vjp(_output, s, x, D, z)
  _, dx_skip, dD, dz = pull_output(dy)
  ddt, ddt_bias = pull_delta(ddelta)
  return scan.Operands(
      dx + dx_skip, ddt, dA.sum(0).T, dB, dC, dD, dz, ddt_bias,
      dh0.swapaxes(1, 2))


def _einsum(equation, *operands):
  # Float32 products on matrix units too; a CPU knows no others.
  return jnp.einsum(equation, *operands, precision='highest')


def _step_sizes(dt, dt_bias, dt_softplus):
  delta = dt.astype(jnp.float32)
  if dt_bias is not None:
    delta = delta + dt_bias.astype(jnp.float32)
  return jax.nn.softplus(delta) if dt_softplus else delta


def _step(h, x, delta, A, B, start):
  """Returns h_t and what is left of h_{t-1} in it."""
  if start is not None:
    h = jnp.where(start[:, None, None], 0.0, h)
  kept = jnp.exp(delta[:, None, :] * A) * h
  return kept + (delta * x)[:, None, :] * B[:, :, None], kept


def _output(s, x, D, z):
  y = s + D.astype(jnp.float32) * x.astype(jnp.float32)
  return y if z is None else y * jax.nn.silu(z.astype(jnp.float32))


def _layout(time):
  """Number and length of the chunks: as even as they can be."""
  number = -(-time // CHUNK)
  return number, -(-time // number)


def _chunks(arrays):
  """[B, T, ...] to [chunks, steps, B, ...], filled up with zeros.

  A step size of zero leaves the state as it is.
  """
  def one(array):
    number, steps = _layout(array.shape[1])
    fill = [(0, 0)] * array.ndim
    fill[1] = (0, number * steps - array.shape[1])
    array = jnp.pad(array, fill).swapaxes(0, 1)
    return array.reshape(number, steps, *array.shape[1:])
  return jax.tree.map(one, arrays)


def _unchunk(array, time):
  array = array.reshape(-1, *array.shape[2:])
  return array[:time].swapaxes(0, 1)
