"""Differential attention (Ye et al. 2024, https://arxiv.org/abs/2410.05258).

  a_i = softmax_j(q_i . k_j / sqrt(H)) of each half of the head: a^1 and a^2
  y_i = (1 - lambda_0) RMSNorm(sum_j (a^1_ij - lambda a^2_ij) v_j),  j <= i
  lambda = exp(l_q^1 . l_k^1) - exp(l_q^2 . l_k^2) + lambda_0
  lambda_0 = 0.8 - 0.6 exp(-0.3 d)

A head is as wide as one of `causal`, V = 2 H: its values are whole, its queries
and keys two halves of width H, each with a softmax of its own. What both maps
attend to, their noise, cancels. The l are four vectors of a layer, d is the
number of layers before it; the norm has one weight for all heads and an eps of
1e-5. Time O(T^2), half as much again as causal's, or O(T W) with a window of
W; the state is the keys and values of all tokens, or of the last W - 1, as many
numbers as causal has.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.ops import flash_attention
from attention.common.options import option
from attention.common.softmax import init_cache, place, recall, visible
from model.layers import RMSNorm, param

STD = 0.1  # Of the l at first.
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Options(flags.GroupedQueries, flags.Rotary, flags.PlainQKNorm,
              flags.Softcap, flags.Window, flags.Flash):
  differential_lambda_init: float | None = option(
      None, 'lambda_0, the same in every layer; none: 0.2 in the first, and '
      'nearer to 0.8 the deeper the layer', at_least=0, below=1)


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    N, K = config.n_head, options.kv_heads(config.n_head)
    V = heads.head_width(config)
    if V % 2:
      raise ValueError(
          f'n_embd ({config.n_embd}) / n_head ({N}) must be even: a '
          'differential head has two halves')
    self.options, self.dtype = options, config.compute_dtype
    self.n_head, self.shapes = N, ((K, V // 2), (K, V // 2), (K, V))
    # Of both maps, side by side.
    self.query, self.key, self.value = heads.qkv(
        config, groups=K, widths=(V, V), rngs=rngs)
    normal = lambda: param(
        STD * jax.random.normal(rngs.params(), (2, V // 2)), '_H', decay=False)
    self.lambda_q, self.lambda_k = normal(), normal()
    self.norm = RMSNorm(V, eps=EPS)
    self.out = heads.out(config, heads=N, width=V, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    options = self.options
    (q, other_q), (k, other_k) = (
        jnp.split(e(x), 2, -1) for e in (self.query, self.key))
    q, k = place(q, k, ctx, options)
    other_q, other_k = place(other_q, other_k, ctx, options)
    (k, other_k, v), visible_to, state = recall(
        (k, other_k, self.value(x)), ctx, state, window=options.window)
    # Not one call of 2 N heads, which would need every value twice in memory
    # and is no faster.
    y, other = (flash_attention(
        q, k, v, ctx, **visible_to, scale=q.shape[-1] ** -0.5,
        softcap=options.softcap, implementation=options.implementation,
    ).astype(jnp.float32) for q, k in ((q, k), (other_q, other_k)))
    start = self._start(ctx)
    ctx.record('lambda', lambda: self._learned() + start)
    y = (1 - start) * self.norm(y - (self._learned() + start) * other)
    return self.out(y.astype(x.dtype)), state

  def _start(self, ctx):
    """lambda_0, float32."""
    if self.options.differential_lambda_init is not None:
      return self.options.differential_lambda_init
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(ctx.depth, jnp.float32))

  def _learned(self):
    """lambda - lambda_0, float32."""
    one, other = jnp.exp((self.lambda_q[...] * self.lambda_k[...]).sum(-1))
    return one - other

  def init_state(self, batch, length):
    return init_cache(self.shapes, batch=batch, length=length,
                      window=self.options.window, dtype=self.dtype)

  def flops(self, length):
    """Forward, per token."""
    dense = (self.query, self.key, self.value, self.out)
    (_, H), _, (_, V) = self.shapes
    return (sum(e.flops for e in dense) + 2 * self.n_head * 2 * (H + V)
            * visible(length, self.options.window))
