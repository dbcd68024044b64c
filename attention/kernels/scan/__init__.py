"""Selective scan, the recurrence of Mamba (Gu & Dao 2023, arXiv 2312.00752).

An implementation is a module with three functions. They see `Operands`, whose
initial state is always there, and `starts` [B, T], True where the state of the
step before must not be seen (None: nowhere):

  check(operands, starts, *, dt_softplus)
      raises NotImplementedError for what it cannot do.
  forward(operands, starts, *, dt_softplus) -> (y, hT, states)
      states: what its backward wants saved besides the operands, such as the
      state before each chunk.
  backward(operands, starts, states, dy, dhT, *, dt_softplus) -> Operands
      the gradients, of any float dtype, None where the operand is None.

The gradient of a shared operand is summed in a fixed order, and no
implementation may hold an array of B T E M elements.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention.kernels import arguments, dispatch

IMPLEMENTATIONS = ('xla', 'tpu', 'gpu')


class Operands(NamedTuple):
  """The differentiable arguments of `selective_scan`, as it names them."""
  x: Float[Array, 'B T E']
  dt: Float[Array, 'B T E']
  A: Float[Array, 'E M']
  B: Float[Array, 'B T M']
  C: Float[Array, 'B T M']
  D: Float[Array, 'E']
  z: Float[Array, 'B T E'] | None
  dt_bias: Float[Array, 'E'] | None
  h0: Float[Array, 'B E M']


def selective_scan(
    x: Float[Array, 'B T E'],
    dt: Float[Array, 'B T E'],
    A: Float[Array, 'E M'],
    B: Float[Array, 'B T M'],
    C: Float[Array, 'B T M'],
    D: Float[Array, 'E'],
    *,
    z: Float[Array, 'B T E'] | None = None,
    dt_bias: Float[Array, 'E'] | None = None,
    dt_softplus: bool = True,
    h0: Float[Array, 'B E M'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    segment_id0: Int[Array, 'B'] | None = None,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T E'], Float[Array, 'B E M']]:
  """Runs h_t = exp(d_t A) h_{t-1} + d_t x_t B_t, y_t = h_t C_t + D x_t.

  Args:
    x: input.
    dt: step size before its bias and softplus: d = softplus(dt + dt_bias).
    A: decay rates, negative.
    B: input directions, shared by all channels.
    C: output directions, likewise.
    D: the skip's weights.
    z: gate, y * silu(z). None: no gate.
    dt_bias: None: zero.
    dt_softplus: False takes dt + dt_bias as it is.
    h0: state before the first step. None: zero.
    segment_ids: id of each step's document; the state is zeroed where it
      changes. None: one document.
    segment_id0: id of the document that h0 belongs to. None: that of the
      first step, so that h0 always counts.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    y in x's dtype and the state after the last step in float32, in which the
    state is kept throughout. Every array but the ids has a gradient, in
    reverse mode.

  Raises:
    ValueError: a shape that does not fit, an unknown implementation.
    NotImplementedError: a named implementation that cannot do this.
  """
  batch, time, channels = x.shape
  state = A.shape[-1]
  check = arguments.check_shape
  check('dt', dt, B=batch, T=time, E=channels)
  check('A', A, E=channels, M=state)
  check('B', B, B=batch, T=time, M=state)
  check('C', C, B=batch, T=time, M=state)
  check('D', D, E=channels)
  check('z', z, B=batch, T=time, E=channels)
  check('dt_bias', dt_bias, E=channels)
  check('h0', h0, B=batch, E=channels, M=state)
  check('segment_ids', segment_ids, B=batch, T=time)
  if time == 0:
    raise ValueError('x has T=0 steps: give it at least one')
  if h0 is None:
    h0 = jnp.zeros((batch, channels, state), jnp.float32)
  starts = arguments.segment_starts(segment_ids, segment_id0)
  operands = Operands(x, dt, A, B, C, D, z, dt_bias, h0)
  module = dispatch.select(
      __name__, implementation, IMPLEMENTATIONS,
      operands, starts, dt_softplus=dt_softplus)
  return _scan(module, dt_softplus, operands, starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(module, dt_softplus, operands, starts):
  y, hT, _ = module.forward(operands, starts, dt_softplus=dt_softplus)
  return y, hT


def _forward(module, dt_softplus, operands, starts):
  y, hT, states = module.forward(operands, starts, dt_softplus=dt_softplus)
  return (y, hT), (operands, starts, states)


def _backward(module, dt_softplus, residuals, cotangents):
  operands, _, _ = residuals
  gradients = module.backward(
      *residuals, *cotangents, dt_softplus=dt_softplus)
  cast = lambda operand, gradient: gradient.astype(operand.dtype)
  return jax.tree.map(cast, operands, gradients), None


_scan.defvjp(_forward, _backward)
