"""Causal multi-head attention (Vaswani et al. 2017) and what grew on it.

  s_ij = q_i . k_j / sqrt(H),  y_i = sum_j softmax_j(s_ij) v_j,  j <= i

with grouped queries, rotary positions, qk norm, softcap, a window, biases of
distance (`attention.common.bias`), an off-by-one softmax or other weights, and
a gate on the heads by flag. With causal_value_residual

  v_j <- m_1 v_j + m_2 u_j,  u of the first layer,  m_1 = m_2 = 1/2 at first

(Zhou et al. 2024, https://arxiv.org/abs/2410.17897). Time O(T^2), or O(T W)
with a window of W; the state is the keys and values of all tokens, or of the
last W - 1, and with forget gates two float32 numbers a head of each.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.gate import Gate
from attention.common.options import option
from attention.common.softmax import Softmax
from attention.common.weights import Weights
from model.layers import param


@dataclasses.dataclass(frozen=True)
class Options(flags.GroupedQueries, flags.Rotary, flags.QKNorm, flags.Softcap,
              flags.Window, flags.Exclusive, flags.OutputGate, Weights):
  causal_value_residual: bool = option(
      False, 'mix the values of the first layer, which must have the flag too, '
      'into those of the layer')


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    H, K = heads.head_width(config), options.kv_heads(config.n_head)
    self.query, self.key, self.value = heads.qkv(
        config, groups=K, widths=(H, H), rngs=rngs)
    self.out = heads.out(config, heads=config.n_head, width=H, rngs=rngs)
    self.softmax = Softmax(
        config, options, kv_shape=(K, H), value_width=H, rngs=rngs)
    self.gate = Gate(config, options, width=H, rngs=rngs)
    self.mix = param(
        jnp.full(2, 0.5), '_', decay=False
    ) if options.causal_value_residual else None

  def __call__(self, x, ctx, state=None):
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.mix is not None:
      own, first = self.mix[...].astype(v.dtype)
      v = own * v + first * (
          v if ctx.first_values is None else ctx.first_values)
    y, state = self.softmax(q, k, v, ctx, state, x=x)
    return self.out(self.gate(x, y, ctx)), state

  def init_state(self, batch, length):
    return self.softmax.init_state(batch, length)

  def flops(self, length):
    dense = (self.query, self.key, self.value, self.gate, self.out)
    return sum(e.flops for e in dense) + self.softmax.flops(length)
