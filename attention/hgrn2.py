"""HGRN2 (Qin et al. 2024, https://arxiv.org/abs/2404.07904).

  f_t = l + (1 - l) sigmoid(x_t W_f)                 of each channel of the keys
  S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T          y = W_O RMSNorm(S_t^T q_t)

with q = silu(x W_q): gated linear attention whose key is what its decay leaves
room for. The lower bound l grows with depth, so that deep layers cannot forget
at once: d / L in the layer after d others of L, which is where the published
model's learned bounds start. The norm is of each head. Time O(T D H), in
chunks; the state is S, N H V numbers in float32 however many tokens it has
seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.ops import delta_rule
from attention.common.options import option
from model.layers import RMSNorm


@dataclasses.dataclass(frozen=True)
class Options(flags.Kernel):
  hgrn2_lower_bound: float | None = option(
      None, 'l, the same in every layer; none: 0 in the first, and nearer to 1 '
      'the deeper the layer', at_least=0, below=1)


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    N, H = config.n_head, heads.head_width(config)
    self.options, self.shape = options, (N, H, H)
    self.n_layer = config.n_layer
    # forget: where attention has keys.
    self.query, self.forget, self.value = heads.qkv(
        config, groups=N, widths=(H, H), rngs=rngs)
    self.norm = RMSNorm(H)
    self.out = heads.out(config, heads=N, width=H, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    log_f = self._log_forget(self.forget(x), ctx)
    y, state = delta_rule(
        jax.nn.silu(self.query(x)), -jnp.expm1(log_f).astype(x.dtype),
        self.value(x), ctx, decay=log_f, state=state,
        implementation=self.options.attention_kernel)
    return self.out(self.norm(y)), state

  def _log_forget(self, logits, ctx):
    """log f, float32 [B,T,N,H]."""
    lower = self.options.hgrn2_lower_bound
    if lower is None:
      lower = jnp.asarray(ctx.depth, jnp.float32) / self.n_layer
    log_gate = jax.nn.log_sigmoid(logits.astype(jnp.float32))
    return jnp.logaddexp(jnp.log(lower), jnp.log1p(-lower) + log_gate)

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    return jnp.zeros((batch, *self.shape))

  def flops(self, length):
    del length  # Every token costs the same.
    dense = (self.query, self.forget, self.value, self.out)
    N, H, V = self.shape
    # Of the recurrence: f S, k v^T added, and q S.
    return sum(e.flops for e in dense) + 5 * N * H * V
