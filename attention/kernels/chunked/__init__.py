"""Linear attention with a matrix state, in chunks.

The common form of linear attention (Katharopoulos et al. 2020, arXiv
2006.16236), RetNet, simple gated linear attention and Mamba-2:

  S_t = a_t S_{t-1} + k_t v_t^T        y_t = q_t^T S_t
  z_t = a_t z_{t-1} + k_t              y_t = q_t^T S_t / (q_t^T z_t + eps)

An implementation is a module with three functions. They see `Operands`, whose
initial states are always there (z0 is None without normalize), and `starts`
[B, T], True where the state of the step before must not be seen (None:
nowhere):

  check(operands, starts, *, normalize)
      raises NotImplementedError for what it cannot do.
  forward(operands, starts, *, normalize) -> (y, sT, zT, states)
      states: what its backward wants saved besides the operands, such as the
      state before each chunk. zT is None without normalize.
  backward(operands, starts, states, dy, dsT, dzT, *, normalize) -> Operands
      the gradients, of any float dtype, None where the operand is None.

The normaliser has a state of its own and is no extra column of v: its output
is the row sum of the weights that multiply v, which a kernel has at hand, and
v's width stays a multiple of the tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention.kernels import arguments, dispatch

IMPLEMENTATIONS = ('xla', 'gpu')


class Operands(NamedTuple):
  """The differentiable arguments, decay per step or None."""
  q: Float[Array, 'B T N H']
  k: Float[Array, 'B T K H']
  v: Float[Array, 'B T K V']
  decay: Float[Array, 'B T K'] | None
  s0: Float[Array, 'B K H V']
  z0: Float[Array, 'B K H'] | None


State = (Float[Array, 'B K H V']
         | tuple[Float[Array, 'B K H V'], Float[Array, 'B K H']])


def chunked_linear_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K V'],
    *,
    decay: Float[Array, 'K'] | Float[Array, 'B T K'] | None = None,
    s0: State | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    segment_id0: Int[Array, 'B'] | None = None,
    normalize: float | None = None,
    implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N V'], State]:
  """Computes y_t = q_t^T S_t with S_t = exp(decay_t) S_{t-1} + k_t v_t^T.

  Args:
    q: queries; N/K query heads in a row share the state of a key/value head.
    k: keys.
    v: values.
    decay: log of the decay, <= 0, per head or per step. None: no decay.
    s0: state before the first step; with normalize the pair (S, z). None:
      zero.
    segment_ids: id of each step's document; the state is zeroed where it
      changes. None: one document.
    segment_id0: id of the document that s0 belongs to. None: that of the
      first step, so that s0 always counts.
    normalize: eps > 0, added to the denominator q_t^T z_t. None: no
      denominator.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    y in v's dtype and the state after the last step in float32, in which the
    state is kept throughout; with normalize the pair (S, z). Every array but
    the ids has a gradient, in reverse mode.

  Raises:
    ValueError: a shape or an eps that does not fit, an unknown implementation.
    NotImplementedError: a named implementation that cannot do this.
  """
  s0, z0 = s0 if isinstance(s0, tuple) else (s0, None)
  _check(q, k, v, decay, s0, z0, segment_ids, normalize)
  batch, time, groups, width = k.shape
  if s0 is None:
    s0 = jnp.zeros((batch, groups, width, v.shape[-1]), jnp.float32)
    if normalize is not None:
      z0 = jnp.zeros((batch, groups, width), jnp.float32)
  if decay is not None:
    decay = jnp.broadcast_to(decay, (batch, time, groups))
  starts = arguments.segment_starts(segment_ids, segment_id0)
  operands = Operands(q, k, v, decay, s0, z0)
  module = dispatch.select(
      __name__, implementation, IMPLEMENTATIONS,
      operands, starts, normalize=normalize)
  y, sT, zT = _attend(module, normalize, operands, starts)
  return y, (sT if normalize is None else (sT, zT))


def _check(q, k, v, decay, s0, z0, segment_ids, normalize):
  batch, time, heads, width = q.shape
  groups, v_width = k.shape[2], v.shape[-1]
  check = arguments.check_shape
  check('k', k, B=batch, T=time, K=groups, H=width)
  check('v', v, B=batch, T=time, K=groups, V=v_width)
  check('s0', s0, B=batch, K=groups, H=width, V=v_width)
  check('z0', z0, B=batch, K=groups, H=width)
  check('segment_ids', segment_ids, B=batch, T=time)
  if decay is not None and decay.ndim == 1:
    check('decay', decay, K=groups)
  else:
    check('decay', decay, B=batch, T=time, K=groups)
  if heads % groups:
    raise ValueError(
        f'q has {heads} heads, no multiple of the {groups} of k: '
        'repeat or drop query heads')
  if time == 0:
    raise ValueError('q has T=0 steps: give it at least one')
  if normalize is not None and normalize <= 0:
    raise ValueError(f'normalize ({normalize}) must be positive: use 1e-6')
  if s0 is not None and (normalize is None) != (z0 is None):
    raise ValueError(
        f's0 does not fit normalize={normalize}: give the pair (S, z) with '
        'normalize, S alone without')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(module, normalize, operands, starts):
  y, sT, zT, _ = module.forward(operands, starts, normalize=normalize)
  return y, sT, zT


def _forward(module, normalize, operands, starts):
  y, sT, zT, states = module.forward(operands, starts, normalize=normalize)
  return (y, sT, zT), (operands, starts, states)


def _backward(module, normalize, residuals, cotangents):
  operands, _, _ = residuals
  gradients = module.backward(*residuals, *cotangents, normalize=normalize)
  cast = lambda operand, gradient: gradient.astype(operand.dtype)
  return jax.tree.map(cast, operands, gradients), None


_attend.defvjp(_forward, _backward)
