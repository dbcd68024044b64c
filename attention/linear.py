"""Linear attention (Katharopoulos et al. 2020, arxiv.org/abs/2006.16236).

  S_t = S_{t-1} + phi(g k_t) v_t^T      z_t = z_{t-1} + phi(g k_t)
  y_t = phi(g q_t)^T S_t / (phi(g q_t)^T z_t + eps)      phi(x) = elu(x) + 1

with one learned g per layer, 1 / sqrt(H) at first. These are attention
weights phi(g q_t) . phi(g k_s) over their sum, positive and computed without
any pair of tokens. Time O(T) in chunks; the state is S and z in float32,
K H (V + 1) numbers however many tokens it has seen.

Grouped queries share the S and z of a key/value head. use_qk_norm normalises
before phi, so that g alone says how far from linear phi is. Rotary turns q
and k before phi too: the weights stay positive and add up to one. After phi
(Su et al. 2021, equation 19) they would depend on distances alone, but could
have either sign and would not add up to one.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.ops import linear_attention
from model.layers import param, rms_normalize, rotary

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Options(flags.GroupedQueries, flags.Rotary, flags.PlainQKNorm,
              flags.Kernel):
  pass


def feature_map(x):
  """elu(x) + 1, as positive as a float can be: elu alone rounds to -1."""
  return jnp.exp(jnp.minimum(x, 0)) + jnp.maximum(x, 0)


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    H, K = heads.head_width(config), options.kv_heads(config.n_head)
    self.options = options
    self.shape = (K, H, H)
    self.query, self.key, self.value = heads.qkv(
        config, groups=K, widths=(H, H), rngs=rngs)
    self.g = param(H ** -0.5, '', decay=False)
    self.out = heads.out(config, heads=config.n_head, width=H, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    q, k = self._features(self.query(x), ctx), self._features(self.key(x), ctx)
    y, state = linear_attention(
        q, k, self.value(x), ctx, state=state, normalize=EPS,
        implementation=self.options.attention_kernel)
    return self.out(y), state

  def _features(self, x, ctx):
    """Queries or keys [B,T,N,H] as phi maps them, in their dtype."""
    options = self.options
    if options.use_rotary_embeddings:
      x = rotary(x, ctx.positions, base=options.rope_base,
                 fraction=options.rope_fraction)
    if options.use_qk_norm:
      x = rms_normalize(x)
    return feature_map(self.g[...] * x.astype(jnp.float32)).astype(x.dtype)

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    K, H, V = self.shape
    return jnp.zeros((batch, K, H, V)), jnp.zeros((batch, K, H))

  def flops(self, length):
    del length  # Every token costs the same.
    dense = (self.query, self.key, self.value, self.out)
    N, (K, H, V) = self.query.out_shape[0], self.shape
    # As the recurrence has it: K heads are updated, N queries read them.
    return sum(e.flops for e in dense) + 2 * (N + K) * H * (V + 1)
