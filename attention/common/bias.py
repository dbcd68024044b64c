"""Biases of softmax scores that fall with the distance of query and key.

ALiBi (Press et al. 2021, https://arxiv.org/abs/2108.12409):

  s_ij <- s_ij - m_n (i - j)      m_n: a slope a head, powers of 2 at best

The forget gate of FoX (Lin et al. 2025, https://arxiv.org/abs/2503.02130):

  s_ij <- s_ij + F_i - F_j        F_i = sum_{l <= i} log f_l
  f_l = sigmoid(w_n . x_l + b_n)

so that key j counts prod_{j < l <= i} f_l times. Both are rows minus columns,
as flash attention takes them, and within a document: positions differ as
indexes do, and F starts anew. F is float32 in two addends, one of them what
the other has lost. The state has F for every token; ALiBi needs none.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common.ops import running_sum
from model.layers import Einsum, param


def alibi_slopes(n_head):
  """The slope of each head: 2^(-8 n / N), n = 1 ... N, for a power of two.

  Of other numbers of heads: those of the next smaller power of two, then every
  other one of those of the next larger one.
  """
  power = 2 ** (n_head.bit_length() - 1)
  return ([2 ** (-8 * n / power) for n in range(1, power + 1)]
          + [2 ** (-4 * n / power) for n in range(1, 2 * (n_head - power), 2)])


def alibi(n_head, *, batch, queries, keys, q_offset):
  """The bias of ALiBi: ([B,T,N,2], [B,S,N,2]), float32.

  Args:
    n_head: N.
    batch: B.
    queries: T.
    keys: S.
    q_offset: index of the first query, counted from the first key.
  """
  # Slopes of 8 bits times an index below 2^16 are exact, and the rest is small.
  addends = jnp.asarray(
      [(_short(m), m - _short(m)) for m in alibi_slopes(n_head)], jnp.float32)
  of = lambda index: jnp.broadcast_to(
      -addends * index[:, None, None], (batch, *index.shape, *addends.shape))
  return of(q_offset + jnp.arange(queries)), of(jnp.arange(keys))


def _short(x):
  """x rounded to 8 bits."""
  mantissa, exponent = math.frexp(x)
  return math.ldexp(round(mantissa * 256), exponent - 8)


class ForgetGate(nnx.Module):
  """F of FoX; `options` has the group ScoreBias."""

  def __init__(self, config, options, *, rngs):
    N = config.n_head
    self.logit = Einsum(
        'BTD,DN->BTN', (config.n_embd, N), std=config.init_std, rngs=rngs)
    self.bias = param(
        jnp.full(N, options.forget_gate_bias_init), 'N', decay=False)

  def __call__(self, x, ctx, state=None):
    """x [B,T,D] -> F, float32 [B,T,N,2].

    Args:
      x: the input of the layer.
      ctx: the Context.
      state: None, or a cache whose last values are the F of before.
    """
    logit = self.logit(x).astype(jnp.float32) + self.bias[...]
    ctx.record('decay', lambda: jax.nn.sigmoid(logit))
    before = jnp.zeros((x.shape[0], logit.shape[2], 2))
    if state is not None and state['values'][-1].shape[1]:
      sums, index = state['values'][-1], state['index']
      # An empty cache is zero everywhere. One of no slots is of a window of
      # one token, which sees no difference.
      last = -1 if index is None else jnp.maximum(index - 1, 0)
      before = sums[:, last]
    return running_sum(jax.nn.log_sigmoid(logit), ctx, before)
