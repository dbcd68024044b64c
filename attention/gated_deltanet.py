"""Gated DeltaNet (Yang et al. 2024, https://arxiv.org/abs/2412.06464).

  q, k, v = silu(conv(x W)), q and k of length 1     b = beta_max sigmoid(x W_b)
  a_t = exp(-A softplus(x_t W_a + c))                of each head
  S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
  y = W_O (RMSNorm(S_t^T q_t / sqrt(H)) * silu(x W_z))

The delta rule replaces what the state has for one key, the decay forgets all
of it. As in Qwen3-Next and OLMo Hybrid. Time O(T D H), in chunks; the state is
S, N H V numbers in float32, and the last inputs of the convolutions.
"""

import jax

from attention.common.delta import Delta as Options
from attention.common.delta import DeltaLayer, HeadDecay, full_gate

__all__ = ['Attention', 'Options']


class Attention(DeltaLayer):

  def __init__(self, config, options, *, rngs):
    super().__init__(
        config, options, decay=HeadDecay(config, rngs=rngs),
        activation=jax.nn.silu, rngs=rngs,
        gate=full_gate(config, options, rngs=rngs))
