"""Linear attention with a matrix state, in chunks.

The common form of linear attention (Katharopoulos et al. 2020, arXiv
2006.16236), RetNet, simple gated linear attention and Mamba-2:

  S_t = a_t S_{t-1} + k_t v_t^T        y_t = q_t^T S_t
  z_t = a_t z_{t-1} + k_t              y_t = q_t^T S_t / (q_t^T z_t + eps)

There is a state for each of the K heads of v. As in grouped queries, N / K
heads of q in a row may read each state, and as in Mamba-2, states may share a
head of k, of q or of both: J heads, K / J states in a row for each. No
implementation repeats an array for it.

The outputs of an implementation (see `attention.kernels.contract`) are
(y, sT, zT), zT None without normalize.

The normaliser has a state of its own and is no extra column of v: its output
is the row sum of the weights that multiply v, which a kernel has at hand, and
v's width stays a multiple of the tile.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention.kernels import contract, dispatch
from attention.kernels.contract import run

IMPLEMENTATIONS = ('xla', 'tpu', 'gpu')


class Operands(NamedTuple):
  """The arrays: decay per step or None, z0 None without normalize."""
  q: Float[Array, 'B T N H']  # or J heads
  k: Float[Array, 'B T J H']
  v: Float[Array, 'B T K V']
  decay: Float[Array, 'B T K'] | None
  s0: Float[Array, 'B K H V']
  z0: Float[Array, 'B K H'] | None
  starts: Bool[Array, 'B T'] | None


class Rule(NamedTuple):
  """What a program is compiled for."""
  normalize: float | None


State = (Float[Array, 'B K H V']
         | tuple[Float[Array, 'B K H V'], Float[Array, 'B K H']])


def chunked_linear_attention(
    q: Float[Array, 'B T N H'] | Float[Array, 'B T J H'],
    k: Float[Array, 'B T K H'] | Float[Array, 'B T J H'],
    v: Float[Array, 'B T K V'],
    *,
    decay: Float[Array, 'K'] | Float[Array, 'B T K'] | None = None,
    s0: State | None = None,
    starts: Bool[Array, 'B T'] | None = None,
    normalize: float | None = None,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N V'] | Float[Array, 'B T K V'], State]:
  """Computes y_t = q_t^T S_t with S_t = exp(decay_t) S_{t-1} + k_t v_t^T.

  Args:
    q: queries; N, a multiple of K: N/K query heads in a row share a state; or
      J, a divisor: K/J states in a row share a query.
    k: keys, one for each state, or J: likewise.
    v: values, one for each state.
    decay: log of the decay, <= 0, per state or per step. None: no decay.
    s0: state before the first step; with normalize the pair (S, z). None:
      zero.
    starts: where a document starts: the state is zeroed before that step.
      None: nowhere.
    normalize: eps > 0, added to the denominator q_t^T z_t. None: no
      denominator.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    y in v's dtype, of the heads of q or v, whichever has more, and the state
    after the last step in float32, in which the state is kept throughout; with
    normalize the pair (S, z). Every array but starts has a gradient, in reverse
    mode.

  Raises:
    ValueError: a shape or an eps that does not fit, an unknown implementation.
    NotImplementedError: a named implementation that cannot do this.
  """
  s0, z0 = s0 if isinstance(s0, tuple) else (s0, None)
  _check(q, k, v, decay, s0, z0, starts, normalize)
  batch, time, states, v_width = v.shape
  if s0 is None:
    s0 = jnp.zeros((batch, states, k.shape[-1], v_width), jnp.float32)
    if normalize is not None:
      z0 = jnp.zeros(s0.shape[:-1], jnp.float32)
  if decay is not None:
    decay = jnp.broadcast_to(decay, (batch, time, states))
  operands, rule = Operands(q, k, v, decay, s0, z0, starts), Rule(normalize)
  module = dispatch.select(
      __name__, implementation, IMPLEMENTATIONS, operands, rule)
  y, sT, zT = run(module, rule, operands)
  return y, (sT if normalize is None else (sT, zT))


def _check(q, k, v, decay, s0, z0, starts, normalize):
  batch, time, heads, width = q.shape
  states, v_width = v.shape[2:]
  shared = k.shape[2]
  check = contract.check_shape
  check('k', k, B=batch, T=time, J=shared, H=width)
  check('v', v, B=batch, T=time, K=states, V=v_width)
  check('s0', s0, B=batch, K=states, H=width, V=v_width)
  check('z0', z0, B=batch, K=states, H=width)
  check('starts', starts, B=batch, T=time)
  if decay is not None and decay.ndim == 1:
    check('decay', decay, K=states)
  else:
    check('decay', decay, B=batch, T=time, K=states)
  if states % shared:
    raise ValueError(
        f'v has {states} heads, no multiple of the {shared} of k: repeat or '
        'drop heads')
  if heads % states and (states % heads or shared not in (heads, states)):
    raise ValueError(
        f'q has {heads} heads, no multiple of the {states} of v, nor as few as '
        f'share them: repeat or drop query heads')
  if time == 0:
    raise ValueError('q has T=0 steps: give it at least one')
  if normalize is not None and normalize <= 0:
    raise ValueError(f'normalize ({normalize}) must be positive: use 1e-6')
  if s0 is not None and (normalize is None) != (z0 is None):
    raise ValueError(
        f's0 does not fit normalize={normalize}: give the pair (S, z) with '
        'normalize, S alone without')
