"""DeltaNet (Yang et al. 2024, https://arxiv.org/abs/2406.06484).

  q, k, v = silu(conv(x W)), q and k of length 1     b = beta_max sigmoid(x W_b)
  S_t = S_{t-1} - b_t k_t (S_{t-1}^T k_t - v_t)^T
  y = W_O (RMSNorm(S_t^T q_t / sqrt(H)) * silu(x W_z))

What the state has for a key is not added to but replaced (the delta rule of
Widrow and Hoff; Schlag et al. 2021, https://arxiv.org/abs/2102.11174): a step
of gradient descent on |S^T k - v|^2. The norm is of each head. delta_beta_max=2
lets a step reflect (Grazzi et al. 2024, https://arxiv.org/abs/2411.12537). Time
O(T D H), in chunks; the state is S, N H V numbers in float32, and the last
inputs of the convolutions.
"""

import jax

from attention.common.delta import Delta as Options
from attention.common.delta import DeltaLayer, full_gate

__all__ = ['Attention', 'Options']


class Attention(DeltaLayer):

  def __init__(self, config, options, *, rngs):
    super().__init__(
        config, options, decay=None, activation=jax.nn.silu, rngs=rngs,
        gate=full_gate(config, options, rngs=rngs))
