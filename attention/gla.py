"""Gated linear attention (Yang et al. 2023, https://arxiv.org/abs/2312.06635).

  a_t = sigmoid(x_t W_1 W_2 + b)^(1/16)              of each channel of the keys
  S_t = Diag(a_t) S_{t-1} + k_t v_t^T
  y = W_O (RMSNorm(S_t^T q_t / sqrt(H)) * silu(x W_z))

with keys half as wide as values, and a norm of each head. Time O(T D H), in
chunks; the state is S, N H V numbers in float32 however many tokens it has
seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.delta import LowRank
from attention.common.ops import delta_rule
from attention.common.options import option
from model.layers import RMSNorm

TEMPERATURE = 16.0  # Of the decays: they start at 0.96.


@dataclasses.dataclass(frozen=True)
class Options(flags.Kernel):
  gla_key_width: int | None = option(
      None, 'width of queries and keys; none: half of n_embd / n_head',
      at_least=1, scales_state='width')
  gla_gate_rank: int = option(
      16, 'rank of the projection to decays', at_least=1)


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    N, V = config.n_head, heads.head_width(config)
    H = options.gla_key_width or max(V // 2, 1)
    self.options, self.shape = options, (N, H, V)
    self.query, self.key, self.value = heads.qkv(
        config, groups=N, widths=(H, V), rngs=rngs)
    self.decay = LowRank(
        config, width=H, rank=options.gla_gate_rank, bias=True, rngs=rngs)
    self.gate = heads.project(
        'BTD,DNV->BTNV', config, heads=N, width=V, rngs=rngs)
    self.norm = RMSNorm(V)
    self.out = heads.out(config, heads=N, width=V, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    logits = self.decay(x).astype(jnp.float32)
    y, state = delta_rule(
        self.query(x) * self.shape[1] ** -0.5, self.key(x), self.value(x), ctx,
        decay=jax.nn.log_sigmoid(logits) / TEMPERATURE, state=state,
        implementation=self.options.attention_kernel)
    y = self.norm(y)
    gate = jax.nn.silu(self.gate(x))
    ctx.record('gate', lambda: gate)
    return self.out(y * gate), state

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    return jnp.zeros((batch, *self.shape))

  def flops(self, length):
    del length  # Every token costs the same.
    dense = (self.query, self.key, self.value, self.decay, self.gate, self.out)
    N, H, V = self.shape
    # Of the recurrence: a S, k v^T added, and q S.
    return sum(e.flops for e in dense) + 5 * N * H * V
