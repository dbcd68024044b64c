"""Selective scan in plain jnp: one step at a time, chunk by chunk.

docs/kernels.md has the design. The state is laid out [B, M, E]: channels last,
so that every step is one vector operation over E, with B_t and C_t broadcast.
Inputs are laid out [T, B, ...], and filled up with zeros to whole chunks: a
step size of zero leaves the state as it is.
"""

import jax
import jax.numpy as jnp

from attention.kernels import scan
from attention.kernels.loops import at, put

CHUNK = 32


def check(operands, rule):
  """Everything is supported."""
  del operands, rule


def forward(operands, rule):
  """See `attention.kernels.scan`."""
  x, dt, A, B, C, D, z, dt_bias, h0, starts = operands
  delta = _step_sizes(dt, dt_bias, rule.dt_softplus)
  A, h = A.astype(jnp.float32).T, h0.astype(jnp.float32).swapaxes(1, 2)

  def step(h, inputs):
    x, delta, B, C, start = inputs
    h = _step(_reset(h, start), x, delta, A, B, rule)
    return h, _einsum('BME,BM->BE', h, C)

  def chunk(h, inputs):
    last, s = jax.lax.scan(step, h, inputs)
    return last, (s, h)

  inputs = _time_first((x, delta, B, C, starts))
  inputs = jax.tree.map(
      lambda a: a.reshape(*_layout(x.shape[1]), *a.shape[1:]), inputs)
  h, (s, states) = jax.lax.scan(chunk, h, inputs)
  s = _batch_first(s.reshape(-1, *s.shape[2:]), x.shape[1])
  y = _output(s, x, D, z).astype(x.dtype)
  return (y, h.swapaxes(1, 2)), states


def backward(operands, rule, states, cotangents):
  """See `attention.kernels.scan`."""
  dy, dhT = cotangents
  x, dt, A, B, C, D, z, dt_bias, h0, starts = operands
  delta, pull_delta = jax.vjp(
      lambda dt, dt_bias: _step_sizes(dt, dt_bias, rule.dt_softplus),
      dt, dt_bias)
  dy = dy.astype(jnp.float32)
  ds = dy if z is None else dy * jax.nn.silu(z.astype(jnp.float32))
  A = A.astype(jnp.float32).T
  number, steps = _layout(x.shape[1])
  inputs = _time_first((x, delta, B, C, starts, ds))

  # Loops that index the whole arrays, not scans: these would cut out each
  # chunk's inputs first, and fill a new array for its states with zeros.
  def chunk(i, carry):
    last = number - 1 - i
    first = last * steps
    dh, dA, before, again_outputs, back_outputs = carry

    def again(i, carry):
      before, outputs = carry
      x, delta, B, C, start, ds = at(inputs, first + i)
      h = _step(_reset(at(before, i), start), x, delta, A, B, rule)
      s = None if z is None else _einsum('BME,BM->BE', h, C)
      dC = _einsum('BME,BE->BM', h, ds)
      return put(before, i + 1, h), put(outputs, first + i, (s, dC))

    def back(i, carry):
      i = steps - 1 - i
      dh, dA, outputs = carry
      x, delta, B, C, start, ds = at(inputs, first + i)
      dh = dh + ds[:, None, :] * C[:, :, None]
      du = _einsum('BME,BM->BE', dh, B)
      dB = _einsum('BME,BE->BM', dh, _input(x, delta, rule))
      # Now of the state before the step; times it, of the exponents.
      dh = jnp.exp(delta[:, None, :] * A) * dh
      dexponents = dh * _reset(at(before, i), start)
      # A product with ones costs less than a sum, which copies A for each row.
      ddelta = _einsum('BME,BM->BE', dexponents * A, jnp.ones(B.shape))
      if rule.scale_input:
        du, ddelta = delta * du, ddelta + x * du
      dA = dA + dexponents * delta[:, None, :]
      outputs = put(outputs, first + i, (du, ddelta, dB))
      return _reset(dh, start), dA, outputs

    before = put(before, 0, at(states, last))
    before, again_outputs = jax.lax.fori_loop(
        0, steps, again, (before, again_outputs))
    dh, dA, back_outputs = jax.lax.fori_loop(
        0, steps, back, (dh, dA, back_outputs))
    return dh, dA, before, again_outputs, back_outputs

  dh = dhT.astype(jnp.float32).swapaxes(1, 2)
  # dA is summed over the batch at the end: cheaper than at every step.
  dA = jnp.zeros_like(dh)
  before = jnp.zeros((steps + 1, *dh.shape))
  wide, narrow = (jnp.zeros(a.shape) for a in (inputs[0], inputs[2]))
  again_outputs = (None if z is None else wide, narrow)
  dh, dA, _, again_outputs, back_outputs = jax.lax.fori_loop(
      0, number, chunk, (dh, dA, before, again_outputs, (wide, wide, narrow)))
  s, dC, dx, ddelta, dB = jax.tree.map(
      lambda array: _batch_first(array, x.shape[1]),
      (*again_outputs, *back_outputs))
  if s is None:
    s = jnp.zeros_like(ds)
  _, pull_output = jax.vjp(_output, s, x, D, z)
  _, dx_skip, dD, dz = pull_output(dy)
  ddt, ddt_bias = pull_delta(ddelta)
  return scan.Operands(
      dx + dx_skip, ddt, dA.sum(0).T, dB, dC, dD, dz, ddt_bias,
      dh.swapaxes(1, 2), None)


def _einsum(equation, *operands):
  # Float32 products on matrix units too; a CPU knows no others.
  return jnp.einsum(equation, *operands, precision='highest')


def _step_sizes(dt, dt_bias, dt_softplus):
  delta = dt.astype(jnp.float32)
  if dt_bias is not None:
    delta = delta + dt_bias.astype(jnp.float32)
  return jax.nn.softplus(delta) if dt_softplus else delta


def _input(x, delta, rule):
  return delta * x if rule.scale_input else x


def _step(h, x, delta, A, B, rule):
  return (jnp.exp(delta[:, None, :] * A) * h
          + _input(x, delta, rule)[:, None, :] * B[:, :, None])


def _reset(h, start):
  return h if start is None else jnp.where(start[:, None, None], 0.0, h)


def _output(s, x, D, z):
  y = s + D.astype(jnp.float32) * x.astype(jnp.float32)
  return y if z is None else y * jax.nn.silu(z.astype(jnp.float32))


def _layout(time):
  """Number and length of the chunks: as even as they can be."""
  number = -(-time // CHUNK)
  return number, -(-time // number)


def _time_first(arrays):
  """[B, T, ...] to [chunks * steps, B, ...]."""
  def one(array):
    number, steps = _layout(array.shape[1])
    fill = [(0, 0)] * array.ndim
    fill[1] = (0, number * steps - array.shape[1])
    return jnp.pad(array, fill).swapaxes(0, 1)
  return jax.tree.map(one, arrays)


def _batch_first(array, time):
  return array[:time].swapaxes(0, 1)
