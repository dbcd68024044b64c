"""Mamba's selective state space (Gu & Dao 2023, arxiv.org/abs/2312.00752).

  x, z = u W_x, u W_z                 x <- silu(conv(x)), causal, depthwise
  dt, B, C = split(x W_s)             each RMS-normalised
  d_t = softplus(dt W_dt + b)         A = -exp(A_log)
  h_t = exp(d_t A) h_{t-1} + d_t x_t B_t
  y_t = h_t C_t + D x_t               out = (norm(y) * silu(z)) W_out

The norms of dt, B and C, which keep large models from diverging, are Jamba's
(Lieber et al. 2024, arxiv.org/abs/2403.19887), that of y is Hymba's (Dong et
al. 2024, arxiv.org/abs/2411.13676); ssm_inner_norm=False is Mamba as published.
Time O(T E M); the state is the last W - 1 inputs of the convolution and h in
float32, E (W - 1 + M) numbers however many tokens it has seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import options as flags
from attention.common.ops import causal_conv1d, selective_scan
from attention.common.options import option
from attention.common.step_sizes import dt_bias
from model.layers import Einsum, RMSNorm, param


@dataclasses.dataclass(frozen=True)
class Options(flags.Kernel):
  ssm_mamba_expand: int = option(
      2, 'inner width, in units of n_embd', at_least=1)
  ssm_conv_kernel_size: int = option(
      3, 'tokens that the convolution sees, itself included', at_least=1)
  ssm_dt_rank: int = option(
      8, 'rank of the projection to step sizes', at_least=1)
  ssm_d_state: int = option(
      16, 'state of every inner channel', at_least=1, scales_state='width')
  ssm_io_bias: bool = option(
      False, 'biases in the projections into and out of the layer')
  ssm_inner_norm: bool = option(
      True, 'RMSNorm on dt, B, C and, before the gate, on y; off: plain Mamba')


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    D, E = config.n_embd, options.ssm_mamba_expand * config.n_embd
    R, M, W = (options.ssm_dt_rank, options.ssm_d_state,
               options.ssm_conv_kernel_size)
    self.options, self.dtype = options, config.compute_dtype
    self.shape = (W, E, M)  # Parameters have one axis more in stacked layers.
    uniform = lambda shape, bound: jax.random.uniform(
        rngs.params(), shape, minval=-bound, maxval=bound)
    dense = dict(std=config.init_std, rngs=rngs)
    into = dict(bias=options.ssm_io_bias, **dense)
    self.input = Einsum('BTD,DE->BTE', (D, E), **into)
    self.gate = Einsum('BTD,DE->BTE', (D, E), **into)
    self.conv = param(uniform((W, E), W ** -0.5), 'WE')
    self.conv_bias = param(uniform((E,), W ** -0.5), 'E')
    # dt, B and C are one product: P = R + 2 M.
    self.select = Einsum('BTE,EP->BTP', (E, R + 2 * M), **dense)
    self.step = Einsum('BTR,RE->BTE', (R, E), **dense)
    self.step.weight[...] = uniform((R, E), R ** -0.5)
    self.dt_bias = param(dt_bias(rngs.params(), E), 'E', decay=False)
    self.A_log = param(jnp.tile(jnp.log(jnp.arange(1, M + 1)), (E, 1)),
                       'EM', decay=False)
    self.D = param(jnp.ones(E), 'E', decay=False)
    self.dt_norm, self.B_norm, self.C_norm, self.y_norm = (
        RMSNorm(n) if options.ssm_inner_norm else None for n in (R, M, M, E))
    dense['std'] /= (2 * config.n_layer) ** 0.5  # GPT-2: 2 L residual sums.
    self.out = Einsum(
        'BTE,ED->BTD', (E, D), bias=options.ssm_io_bias, **dense)

  def __call__(self, x, ctx, state=None):
    taps, h = (None, None) if state is None else state
    z = self.gate(x)
    x, taps = causal_conv1d(
        self.input(x), self.conv[...], self.conv_bias[...], state=taps,
        starts=ctx.starts)
    x = jax.nn.silu(x)
    R, M = self.options.ssm_dt_rank, self.options.ssm_d_state
    dt, B, C = jnp.split(self.select(x), (R, R + M), axis=-1)
    normed = self.options.ssm_inner_norm
    if normed:
      dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
    dt, A = self.step(dt), -jnp.exp(self.A_log[...])
    step_size = lambda: jax.nn.softplus(
        dt.astype(jnp.float32) + self.dt_bias[...])
    ctx.record('step_size', step_size)
    ctx.record('decay', lambda: jnp.exp(step_size()[..., None] * A))
    ctx.record('gate', lambda: jax.nn.silu(z))
    y, h = selective_scan(
        x, dt, A, B, C, self.D[...], ctx, z=None if normed else z,
        dt_bias=self.dt_bias[...], h0=h,
        implementation=self.options.attention_kernel)
    if normed:
      y = self.y_norm(y) * jax.nn.silu(z)
    return self.out(y), (taps, h)

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    W, E, M = self.shape
    return jnp.zeros((batch, W - 1, E), self.dtype), jnp.zeros((batch, E, M))

  def flops(self, length):
    del length  # Every token costs the same.
    dense = (self.input, self.gate, self.select, self.step, self.out)
    W, E, M = self.shape
    # Of the scan: d A, its product with h, d x B added, and h C.
    return sum(e.flops for e in dense) + 2 * W * E + 6 * E * M
