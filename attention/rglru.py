"""Griffin's recurrent block (De et al. 2024, https://arxiv.org/abs/2402.19427).

  x, z = u W_x, u W_z                     x <- conv(x), causal, depthwise
  r_t = sigmoid(W_r x_t + b_r)            i_t = sigmoid(W_i x_t + b_i)
  log a_t = -c softplus(Lambda) r_t       c = 8
  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t
  out = (h * gelu(z)) W_out

W_r and W_i have n_head blocks on their diagonals. Where a document starts the
root is 1, as the input has no state beside it there (recurrentgemma has it so).
Time O(T E); the state is the last W - 1 inputs of the convolution and h in
float32, E W numbers however many tokens it has seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import options as flags
from attention.common.ops import causal_conv1d, linear_recurrence
from attention.common.options import option
from model.layers import Einsum, param

C = 8.0
DECAYS = (0.9, 0.999)  # Of a^c at first; section 2.4.
# Below it 1 - a^2 counts as so much: the slope of a root at 0 is infinite.
LEAST = 1e-12


@dataclasses.dataclass(frozen=True)
class Options(flags.Kernel):
  rglru_width: int | None = option(
      None, 'inner width, a multiple of n_head; none: n_embd', at_least=1,
      scales_state='width')
  rglru_conv_kernel_size: int = option(
      4, 'tokens that the convolution sees, itself included', at_least=1)

  def width(self, config):
    """E, which the n_head blocks of the gates divide."""
    E, N = self.rglru_width or config.n_embd, config.n_head
    if E % N:
      flag = 'rglru_width' if self.rglru_width else 'n_embd'
      raise ValueError(f'n_head ({N}) must divide {flag} ({E}): the gates have '
                       'a block for each head')
    return E


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    D, E, N = config.n_embd, options.width(config), config.n_head
    W = options.rglru_conv_kernel_size
    self.options, self.dtype = options, config.compute_dtype
    self.shape = (W, E)  # Parameters have one axis more in stacked layers.
    dense = dict(std=config.init_std, bias=config.bias, rngs=rngs)
    self.input = Einsum('BTD,DE->BTE', (D, E), **dense)
    self.gate = Einsum('BTD,DE->BTE', (D, E), **dense)
    self.conv = param(
        W ** -0.5 * jax.random.normal(rngs.params(), (W, E)), 'WE')
    self.conv_bias = param(jnp.zeros(E), 'E')
    self.r, self.i = (Blocks(N, E // N, rngs=rngs) for _ in range(2))
    decay = jax.random.uniform(
        rngs.params(), (E,), minval=DECAYS[0], maxval=DECAYS[1])
    # softplus(Lambda) = -log(a^c) / c.
    self.Lambda = param(
        jnp.log(jnp.expm1(-jnp.log(decay) / C)), 'E', decay=False)
    dense['std'] /= (2 * config.n_layer) ** 0.5  # GPT-2: 2 L residual sums.
    self.out = Einsum('BTE,ED->BTD', (E, D), **dense)

  def __call__(self, x, ctx, state=None):
    taps, h = (None, None) if state is None else state
    z = self.gate(x)
    x, taps = causal_conv1d(
        self.input(x), self.conv[...], self.conv_bias[...], state=taps,
        starts=ctx.starts)
    log_a = -C * jax.nn.softplus(self.Lambda[...]) * self.r(x)
    # 1 - a^2, to float32 also where a is nearly 1.
    scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), LEAST))
    scale = jnp.where(ctx.positions[..., None] == 0, 1.0, scale)
    entering = self.i(x)
    ctx.record('input_gate', lambda: entering)
    h, last = linear_recurrence(
        (scale * entering * x).astype(x.dtype), log_a, ctx, h0=h,
        implementation=self.options.attention_kernel)
    gate = jax.nn.gelu(z)
    ctx.record('gate', lambda: gate)
    return self.out(h * gate), (taps, last)

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    W, E = self.shape
    return jnp.zeros((batch, W - 1, E), self.dtype), jnp.zeros((batch, E))

  def flops(self, length):
    del length  # Every token costs the same.
    dense = (self.input, self.gate, self.r, self.i, self.out)
    W, E = self.shape
    # Of the recurrence: a h, and the input added.
    return sum(e.flops for e in dense) + 2 * W * E + 2 * E


class Blocks(nnx.Module):
  """sigmoid(W x + b), W with blocks on its diagonal, in float32."""

  def __init__(self, blocks, width, *, rngs):
    shape = (blocks, width, width)
    self.flops = 2 * blocks * width * width
    self.weight = param(
        width ** -0.5 * jax.random.normal(rngs.params(), shape), 'NHV')
    self.bias = param(jnp.zeros((blocks, width)), 'NV', decay=False)

  def __call__(self, x):
    w = self.weight[...].astype(x.dtype)
    heads = x.reshape(*x.shape[:2], *w.shape[:2])
    y = jnp.einsum('BTNH,NHV->BTNV', heads, w).astype(jnp.float32)
    return jax.nn.sigmoid(y + self.bias[...]).reshape(x.shape)
