"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

  c = RMSNorm(W_DKV x)     k = [W_UK c ; RoPE(W_KR x)]     v = W_UV c
  q = [W_Q x ; RoPE(W_QR x)]      s_ij = q_i . k_j / sqrt(H + rotary)
  y = W_O softmax(s) v

Section 2.1, without the compression of queries; RoPE(W_KR x) is shared by the
heads. Time O(T^2), or O(T W) with a window of W. The state holds c and the
rotary key alone, R + rotary numbers a token whatever the number of heads: a
call with a state attends in the absorbed form,

  s_ij = [W_UK^T q_i ; RoPE(W_QR x_i)] . [c_j ; RoPE(W_KR x_j)] / sqrt(...)
  y = W_O W_UV softmax(s) c

which is attention with one key head, of width R + rotary.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.gate import Gate
from attention.common.ops import flash_attention
from attention.common.options import option
from attention.common.softmax import init_cache, recall, visible
from model.layers import Einsum, RMSNorm, param, rotary


@dataclasses.dataclass(frozen=True)
class Options(flags.RopeBase, flags.Softcap, flags.Window, flags.OutputGate,
              flags.Flash):
  mla_latent_dim: int | None = option(
      None, 'width of the latent that keys and values are compressed to; '
      'none: n_embd / 4', at_least=1, scales_state='width')
  mla_rotary_dim: int = option(
      32, 'width of the rotary part of queries and keys, even; 0: no such '
      'part', at_least=0)
  use_mla_lobo: bool = option(
      False, 'learned off-by-one softmax, one lambda per head')
  mla_lobo_init: float = option(
      0.0, 'with use_mla_lobo: initial lambda', needs=('use_mla_lobo',))

  def __post_init__(self):
    super().__post_init__()
    if self.mla_rotary_dim % 2:
      raise ValueError(f'mla_rotary_dim ({self.mla_rotary_dim}) must be even: '
                       'its numbers are rotated in pairs')


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    D, N, H = config.n_embd, config.n_head, heads.head_width(config)
    R = options.mla_latent_dim or max(D // 4, 1)
    turned = options.mla_rotary_dim
    self.options = options
    self.implementation = options.implementation
    self.dtype = config.compute_dtype
    self.n_head, self.head_width, self.rank = N, H, R
    self.scale = (H + turned) ** -0.5
    self.softcap, self.window = options.softcap, options.window
    dense = dict(std=config.init_std, bias=config.bias, rngs=rngs)
    # The content and the rotary part, of queries and of keys, side by side.
    self.query = Einsum('BTD,DNH->BTNH', (D, N, H + turned), **dense)
    self.down = Einsum('BTD,DP->BTP', (D, R + turned), **dense)
    self.norm = RMSNorm(R)
    # Without biases, for which the absorbed form has no place.
    up = dict(std=config.init_std, rngs=rngs)
    self.key = Einsum('BTR,RNH->BTNH', (R, N, H), **up)
    self.value = Einsum('BTR,RNV->BTNV', (R, N, H), **up)
    self.log_sink = param(
        jnp.full(N, options.mla_lobo_init), 'N', decay=False
    ) if options.use_mla_lobo else None
    self.out = heads.out(config, heads=N, width=H, rngs=rngs)
    self.gate = Gate(config, options, width=H, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    turn = lambda x: rotary(x, ctx.positions, base=self.options.rope_base)
    q, q_rotary = jnp.split(self.query(x), [self.head_width], -1)
    c, k_rotary = jnp.split(self.down(x), [self.rank], -1)
    q_rotary, k_rotary = turn(q_rotary), turn(k_rotary[:, :, None])[:, :, 0]
    c = self.norm(c)
    absorbed = state is not None
    (seen,), visible_to, state = recall(
        (jnp.concatenate([c, k_rotary], -1),), ctx, state, window=self.window)
    if absorbed:
      q = jnp.einsum('BTNH,RNH->BTNR', q, self.key.weight[...].astype(q.dtype))
      k = seen[:, :, None]
      v = k[..., :self.rank]
    else:
      k, v = self.key(c), self.value(c)
      shared = jnp.broadcast_to(k_rotary[:, :, None], q_rotary.shape)
      k = jnp.concatenate([k, shared], -1)
    y = flash_attention(
        jnp.concatenate([q, q_rotary], -1), k, v, ctx, **visible_to,
        sink=None if self.log_sink is None else self.log_sink[...],
        scale=self.scale, softcap=self.softcap,
        implementation=self.implementation)
    if absorbed:
      y = jnp.einsum(
          'BTNR,RNV->BTNV', y, self.value.weight[...].astype(y.dtype))
    return self.out(self.gate(x, y, ctx)), state

  def init_state(self, batch, length):
    width = self.rank + self.options.mla_rotary_dim
    return init_cache(((width,),), batch=batch, length=length,
                      window=self.window, dtype=self.dtype)

  def flops(self, length):
    """Forward, per token, without a state."""
    dense = (self.query, self.down, self.key, self.value, self.gate,
             self.out)
    widths = 2 * self.head_width + self.options.mla_rotary_dim
    return (sum(e.flops for e in dense)
            + 2 * self.n_head * widths * visible(length, self.window))
