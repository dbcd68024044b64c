"""Linear attention whose state forgets by channel and is corrected by a rule.

The gated delta rule (Yang et al. 2024, arXiv 2412.06464; by channel Kimi Delta
Attention, arXiv 2510.26692), and without it gated linear attention (Yang et al.
2023, arXiv 2312.06635):

  S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T    y_t = q_t^T S_t
  S_t = Diag(a_t) S_{t-1} + k_t v_t^T                             without b

The outputs of an implementation (see `attention.kernels.contract`) are (y, sT).
It takes the steps in chunks. What a chunk does to the state is S -> D S - P S +
K^T U, with matrices of the chunk alone: D is diagonal, P of rank C. So chunks
are made in parallel, up to one product each that goes from state to state, and
what a backward has to have saved is the state before some of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention.kernels import contract, dispatch
from attention.kernels.contract import run

IMPLEMENTATIONS = ('xla',)


class Operands(NamedTuple):
  """The arrays of `delta_rule`, as it names them; s0 is always there."""
  q: Float[Array, 'B T N H']
  k: Float[Array, 'B T K H']
  v: Float[Array, 'B T K V']
  beta: Float[Array, 'B T K'] | None
  decay: Float[Array, 'B T K'] | Float[Array, 'B T K H'] | None
  s0: Float[Array, 'B K H V']
  starts: Bool[Array, 'B T'] | None


class Rule(NamedTuple):
  """What a program is compiled for: nothing but what operands there are."""


def delta_rule(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K V'],
    *,
    beta: Float[Array, 'B T K'] | None = None,
    decay: Float[Array, 'B T K'] | Float[Array, 'B T K H'] | None = None,
    s0: Float[Array, 'B K H V'] | None = None,
    starts: Bool[Array, 'B T'] | None = None,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B K H V']]:
  """Computes y_t = q_t^T S_t with the state S_t of the module's docstring.

  Args:
    q: queries; N/K query heads in a row share the state of a key/value head.
    k: keys. With beta, of length one: longer ones than 2 / beta diverge.
    v: values.
    beta: how much of what the state has for a key the value replaces, in
      [0, 2]: 1 all of it, 2 reflects it. None: values are added to it.
    decay: log of the decay, <= 0, of a step or of each key channel. None: no
      decay.
    s0: state before the first step. None: zero.
    starts: where a document starts: the state is zeroed before that step.
      None: nowhere.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    y in v's dtype and the state after the last step in float32, in which the
    state is kept throughout. Every array but starts has a gradient, in
    reverse mode.

  Raises:
    ValueError: a shape that does not fit, an unknown implementation.
    NotImplementedError: a named implementation that cannot do this.
  """
  _check(q, k, v, beta, decay, s0, starts)
  batch, _, groups, width = k.shape
  if s0 is None:
    s0 = jnp.zeros((batch, groups, width, v.shape[-1]), jnp.float32)
  operands, rule = Operands(q, k, v, beta, decay, s0, starts), Rule()
  module = dispatch.select(
      __name__, implementation, IMPLEMENTATIONS, operands, rule)
  return run(module, rule, operands)


def _check(q, k, v, beta, decay, s0, starts):
  batch, time, heads, width = q.shape
  groups, v_width = k.shape[2], v.shape[-1]
  check = contract.check_shape
  check('k', k, B=batch, T=time, K=groups, H=width)
  check('v', v, B=batch, T=time, K=groups, V=v_width)
  check('beta', beta, B=batch, T=time, K=groups)
  channels = dict(H=width) if decay is not None and decay.ndim == 4 else {}
  check('decay', decay, B=batch, T=time, K=groups, **channels)
  check('s0', s0, B=batch, K=groups, H=width, V=v_width)
  check('starts', starts, B=batch, T=time)
  if heads % groups:
    raise ValueError(
        f'q has {heads} heads, no multiple of the {groups} of k: '
        'repeat or drop query heads')
  if time == 0:
    raise ValueError('q has T=0 steps: give it at least one')
