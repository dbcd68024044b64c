"""Kimi Delta Attention (Kimi Linear 2025, https://arxiv.org/abs/2510.26692).

  q, k, v = silu(conv(x W)), q and k of length 1     b = beta_max sigmoid(x W_b)
  a_t = exp(-A softplus(x_t W_a + c))                of each channel of the keys
  S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T
  y = W_O (RMSNorm(S_t^T q_t / sqrt(H)) * sigmoid(x W_z))

Gated DeltaNet with a decay for every channel; W_a and W_z are of the rank of a
head. Time O(T D H), in chunks; the state is S, N H V numbers in float32, and
the last inputs of the convolutions.
"""

import jax

from attention.common.delta import ChannelDecay, DeltaLayer, LowRank, sizes
from attention.common.delta import Delta as Options

__all__ = ['Attention', 'Options']


class Attention(DeltaLayer):

  def __init__(self, config, options, *, rngs):
    _, H, V = sizes(config, options)
    super().__init__(
        config, options, decay=ChannelDecay(config, rngs=rngs),
        activation=jax.nn.sigmoid, rngs=rngs,
        gate=LowRank(config, width=V, rank=H, rngs=rngs))
