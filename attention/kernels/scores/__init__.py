"""Attention with other weights than those of the softmax, or other scores.

  s_ij = cap(scale q_i . k_j) + b_ij      y_i = sum_j w(s_i)_j v_j

over the keys that a query sees: what `weights` and `fire` are put into. The
output of an implementation (see `attention.kernels.contract`) is y.

No kernel: where the softmax is all that is wanted, flash is the op.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention.kernels import contract, dispatch
from attention.kernels.contract import run
from attention.kernels.scores.fire import Fire
from attention.kernels.scores.weights import Weigh

IMPLEMENTATIONS = ('xla', 'plain')


class Operands(NamedTuple):
  """The arrays; those that are learned have N of each."""
  q: Float[Array, 'B T N H']
  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K V']
  q_ids: Int[Array, 'B T'] | None
  kv_ids: Int[Array, 'B S'] | None
  q_offset: Int[Array, '']
  positions: Int[Array, 'B T'] | None
  learned: tuple  # of rule.weigh
  fire: tuple | None  # of rule.fire
  row_bias: Float[Array, 'B T N A'] | None = None
  column_bias: Float[Array, 'B S N A'] | None = None


class Rule(NamedTuple):
  """What a program is compiled for."""
  weigh: Weigh
  scale: float
  window: int
  softcap: float
  by_length: bool
  fire: Fire | None

  @property
  def causal(self):
    """As flash's masks ask for it."""
    return True


def weighted_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    *,
    weigh: Weigh,
    learned: tuple = (),
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    by_length: bool = False,
    fire: Fire | None = None,
    fire_learned: tuple | None = None,
    bias: tuple[Float[Array, 'B T N A'], Float[Array, 'B S N A']] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    segment_ids: tuple[Int[Array, 'B T'], Int[Array, 'B S']] | None = None,
    q_offset: int | Int[Array, ''] = 0,
    implementation: str = 'auto',
) -> Float[Array, 'B T N V']:
  """Attends causally from q to k and v, with weights of `weigh`.

  Args:
    q, k, v, scale, window, softcap, bias, q_offset: as in
      `attention.kernels.flash`. There the softmax is of s, here any weights.
    weigh: of `attention.kernels.scores.weights`.
    learned: its learned numbers, [N] or [N,...] each.
    by_length: divide by the number of keys that a query sees.
    fire: add this bias to the scores, or None.
    fire_learned: its learned numbers.
    positions: of the queries in their documents, which fire needs.
    segment_ids: of queries and of keys; a query sees those of its own alone.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    y in v's dtype; scores and weights are float32.

  Raises:
    ValueError: a shape that does not fit, an unknown implementation.
  """
  batch, time, n_head, width = q.shape
  keys, groups = k.shape[1:3]
  check = contract.check_shape
  check('k', k, B=batch, S=keys, K=groups, H=width)
  check('v', v, B=batch, S=keys, K=groups, V=v.shape[-1])
  check('positions', positions, B=batch, T=time)
  if n_head % groups:
    raise ValueError(
        f'the heads of k ({groups}) must divide those of q ({n_head})')
  if (fire is None) != (fire_learned is None) or fire and positions is None:
    raise ValueError('fire, fire_learned and positions come together: give '
                     'all of them or none')
  q_ids, kv_ids = segment_ids or (None, None)
  row_bias, column_bias = bias or (None, None)
  if bias is not None:
    A = bias[0].shape[-1]
    check('the bias of q', row_bias, B=batch, T=time, N=n_head, A=A)
    check('the bias of k', column_bias, B=batch, S=keys, N=n_head, A=A)
  operands = Operands(
      q, k, v, q_ids, kv_ids, jnp.asarray(q_offset, jnp.int32), positions,
      learned, fire_learned, row_bias, column_bias)
  rule = Rule(weigh, float(scale), int(window), float(softcap),
              bool(by_length), fire)
  module = dispatch.select(
      __name__, implementation, IMPLEMENTATIONS, operands, rule)
  return run(module, rule, operands)
