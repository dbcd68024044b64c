"""Recurrences of channels, each with states of its own.

`selective_scan` is the recurrence of Mamba (Gu & Dao 2023, arXiv 2312.00752),
fused with what is around it; `linear_recurrence`, h <- a h + x, its plainest
form: one state, whose input no step size multiplies.

The outputs of an implementation (see `attention.kernels.contract`) are (y, hT).
The gradient of a shared operand is summed in a fixed order, and no
implementation may hold an array of B T E M elements.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention.kernels import contract, dispatch
from attention.kernels.contract import run

IMPLEMENTATIONS = ('xla', 'tpu', 'gpu')


class Operands(NamedTuple):
  """The arrays of `selective_scan`, as it names them; h0 is always there."""
  x: Float[Array, 'B T E']
  dt: Float[Array, 'B T E']
  A: Float[Array, 'E M']
  B: Float[Array, 'B T M']
  C: Float[Array, 'B T M']
  D: Float[Array, 'E']
  z: Float[Array, 'B T E'] | None
  dt_bias: Float[Array, 'E'] | None
  h0: Float[Array, 'B E M']
  starts: Bool[Array, 'B T'] | None


class Rule(NamedTuple):
  """What a program is compiled for."""
  dt_softplus: bool
  scale_input: bool  # whether the states take in d x, or x as it is


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
    scale_input: bool = True,
    h0: Float[Array, 'B E M'] | None = None,
    starts: Bool[Array, 'B T'] | None = None,
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
    scale_input: False takes x_t B_t into the state, without d_t.
    h0: state before the first step. None: zero.
    starts: where a document starts: the state is zeroed before that step.
      None: nowhere.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    y in x's dtype and the state after the last step in float32, in which the
    state is kept throughout. Every array but starts has a gradient, in
    reverse mode.

  Raises:
    ValueError: a shape that does not fit, an unknown implementation.
    NotImplementedError: a named implementation that cannot do this.
  """
  batch, time, channels = x.shape
  state = A.shape[-1]
  check = contract.check_shape
  check('dt', dt, B=batch, T=time, E=channels)
  check('A', A, E=channels, M=state)
  check('B', B, B=batch, T=time, M=state)
  check('C', C, B=batch, T=time, M=state)
  check('D', D, E=channels)
  check('z', z, B=batch, T=time, E=channels)
  check('dt_bias', dt_bias, E=channels)
  check('h0', h0, B=batch, E=channels, M=state)
  check('starts', starts, B=batch, T=time)
  if time == 0:
    raise ValueError('x has T=0 steps: give it at least one')
  if h0 is None:
    h0 = jnp.zeros((batch, channels, state), jnp.float32)
  operands = Operands(x, dt, A, B, C, D, z, dt_bias, h0, starts)
  rule = Rule(dt_softplus, scale_input)
  module = dispatch.select(
      __name__, implementation, IMPLEMENTATIONS, operands, rule)
  return run(module, rule, operands)


def linear_recurrence(
    x: Float[Array, 'B T E'],
    log_decay: Float[Array, 'B T E'],
    *,
    h0: Float[Array, 'B E'] | None = None,
    starts: Bool[Array, 'B T'] | None = None,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T E'], Float[Array, 'B E']]:
  """Runs h_t = exp(log_decay_t) h_{t-1} + x_t, channel by channel.

  Args:
    x: input.
    log_decay: log of the decay, <= 0.
    h0, starts, implementation: as in `selective_scan`.

  Returns:
    h in x's dtype and the state after the last step in float32, in which the
    state is kept throughout; likewise.
  """
  batch, time, channels = x.shape
  contract.check_shape('log_decay', log_decay, B=batch, T=time, E=channels)
  ones = jnp.ones((batch, time, 1))
  h, last = selective_scan(
      x, -log_decay, -jnp.ones((channels, 1)), ones, ones, jnp.zeros(channels),
      dt_softplus=False, scale_input=False, starts=starts,
      h0=None if h0 is None else h0[:, :, None], implementation=implementation)
  return h, last[:, :, 0]
