"""A short causal convolution of heads, and what it keeps for the next call."""

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common.ops import causal_conv1d
from model.layers import param


class ShortConv(nnx.Module):
  """silu(conv(x)) of heads [B,T,N,H], channel by channel, without a bias."""

  def __init__(self, *, heads, width, taps, dtype, rngs):
    self.shape, self.dtype = (taps, heads, width), dtype
    self.weight = param(jax.random.uniform(
        rngs.params(), self.shape, minval=-taps ** -0.5, maxval=taps ** -0.5),
        'WNH')

  def __call__(self, x, ctx, state):
    """([B,T,N,H], the state), from a state of `init_state` or None."""
    flat = lambda x: x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
    y, state = causal_conv1d(
        flat(x), self.weight[...].reshape(self.shape[0], -1),
        state=None if state is None else flat(state), starts=ctx.starts)
    taps, *head = self.shape
    return (jax.nn.silu(y).reshape(x.shape),
            state.reshape(x.shape[0], taps - 1, *head))

  def init_state(self, batch):
    taps, *head = self.shape
    return jnp.zeros((batch, taps - 1, *head), self.dtype)

  @property
  def flops(self):
    """Forward, per token."""
    taps, heads, width = self.shape
    return 2 * taps * heads * width
