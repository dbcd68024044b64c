"""Causal attention with heads of free width, summed instead of concatenated.

  o_n = softmax(q_n k_n^T / sqrt(H)) v_n,  q_n, k_n [T,H],  v_n [T,V]
  y = sum_g (sum_{n in g} o_n) W_g,  W_g [V,D],  n_cproj groups of N / n_cproj

H, V and N are free of n_embd: there may be as many heads as wanted, at the
cost of one projection. The heads are those of Vaswani et al. 2017
(https://arxiv.org/abs/1706.03762); their concatenation is a group a head,
n_cproj = n_head or use_concat_heads. Time O(T^2), or O(T W) with a window of
W; the state is the keys and values, K (H + V) numbers a token.
"""

import dataclasses

from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.gate import Gate
from attention.common.options import option
from attention.common.softmax import Softmax
from attention.common.weights import Weights


@dataclasses.dataclass(frozen=True)
class Options(flags.GroupedQueries, flags.Rotary, flags.QKNorm, flags.Softcap,
              flags.Window, flags.Exclusive, flags.OutputGate, Weights):
  n_qk_head_dim: int | None = option(
      None, 'width of queries and keys; none: n_embd / n_head', at_least=1)
  n_v_head_dim: int | None = option(
      None, 'width of values; none: n_embd / n_head', at_least=1)
  n_cproj: int | None = option(
      None, 'groups of heads, each summed and then projected by its own '
      'matrix, a divisor of n_head; none: 1', at_least=1)
  use_concat_heads: bool = option(
      False, 'concatenate the heads instead of summing them')

  def __post_init__(self):
    super().__post_init__()
    if self.use_concat_heads and self.n_cproj is not None:
      raise ValueError(f'n_cproj ({self.n_cproj}) sums heads, '
                       'use_concat_heads does not: drop one of them')

  def groups(self, n_head):
    """The groups of heads that are summed."""
    if self.use_concat_heads:
      return n_head
    return flags.divisor('n_cproj', self.n_cproj or 1, n_head)


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    N, K = config.n_head, options.kv_heads(config.n_head)
    H, V = (getattr(options, flag) or heads.head_width(config, instead=flag)
            for flag in ('n_qk_head_dim', 'n_v_head_dim'))
    self.groups = options.groups(N)
    self.query, self.key, self.value = heads.qkv(
        config, groups=K, widths=(H, V), rngs=rngs)
    self.out = heads.out(config, heads=self.groups, width=V, rngs=rngs)
    self.softmax = Softmax(
        config, options, kv_shape=(K, H), value_width=V, rngs=rngs)
    self.gate = Gate(config, options, width=V, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    y, state = self.softmax(
        self.query(x), self.key(x), self.value(x), ctx, state, x=x)
    y = self.gate(x, y, ctx)
    B, T, N, V = y.shape
    if self.groups < N:
      y = y.reshape(B, T, self.groups, -1, V).sum(3)
    return self.out(y), state

  def init_state(self, batch, length):
    return self.softmax.init_state(batch, length)

  def flops(self, length):
    dense = (self.query, self.key, self.value, self.gate, self.out)
    return sum(e.flops for e in dense) + self.softmax.flops(length)
