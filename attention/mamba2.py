"""Mamba-2, state space duality (Dao & Gu 2024, arxiv.org/abs/2405.21060).

  z, x, B, C, dt = u W_z, u W_x, split(u W_s)
  x, B, C <- silu(conv(.)), causal, depthwise
  d_t = clip(softplus(dt + b))            a_t = exp(-exp(A_log) d_t)
  S_t = a_t S_{t-1} + d_t B_t x_t^T       y_t = S_t^T C_t + D x_t
  out = rms_norm(y * silu(z)) W_out       in mamba2_n_groups groups of heads

It is linear attention: C are the queries, B the keys, both of a group of heads,
d x the values and a the decay of every head. A_log, b and D are numbers of a
head. What the paper has as one projection and one convolution is cut where the
mesh cuts heads, which changes nothing. Time O(T E M) in matrix products; the
state is the last W - 1 inputs of the convolutions and S in float32, E M +
(W - 1) (E + 2 J M) numbers for J groups however many tokens it has seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.ops import causal_conv1d, linear_attention
from attention.common.options import divisor, option
from attention.common.step_sizes import dt_bias
from model.layers import Einsum, param, rms_normalize

A_RANGE = (1.0, 16.0)  # Of the initial exp(A_log), uniform; as published.
EPS = 1e-5  # Of the norm, as published.


@dataclasses.dataclass(frozen=True)
class Options(flags.Kernel):
  mamba2_expand: int = option(
      2, 'inner width, in units of n_embd', at_least=1)
  mamba2_head_dim: int | None = option(
      None, 'width of a head, a divisor of the inner width; none: n_embd / '
      'n_head', at_least=1)
  mamba2_d_state: int = option(
      64, 'state of every inner channel: the width of B and C', at_least=1,
      scales_state='width')
  mamba2_n_groups: int = option(
      1, 'groups of heads, each with B, C and an output norm', at_least=1)
  mamba2_conv_kernel_size: int = option(
      4, 'tokens that the convolution sees, itself included', at_least=1)
  mamba2_dt_at_least: float = option(
      0.0, 'least step size', at_least=0)
  mamba2_dt_at_most: float | None = option(
      None, 'largest step size; none: any', above=0)

  def __post_init__(self):
    super().__post_init__()
    low, high = self.mamba2_dt_at_least, self.mamba2_dt_at_most
    if high is not None and low >= high:
      raise ValueError(f'mamba2_dt_at_least ({low}) must be less than '
                       f'mamba2_dt_at_most ({high})')

  def shape(self, config):
    """(J, N, V): groups, heads and their width."""
    E = self.mamba2_expand * config.n_embd
    V = self.mamba2_head_dim or heads.head_width(
        config, instead='mamba2_head_dim')
    if E % V:
      raise ValueError(f'mamba2_head_dim ({V}) must divide mamba2_expand x '
                       f'n_embd ({E})')
    N = E // V
    return divisor('mamba2_n_groups', self.mamba2_n_groups, N,
                   name="mamba2's heads"), N, V


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    J, N, V = options.shape(config)
    M, W = options.mamba2_d_state, options.mamba2_conv_kernel_size
    self.options, self.dtype = options, config.compute_dtype
    self.shape = (W, J, M, N, V)
    uniform = lambda shape, low, high: jax.random.uniform(
        rngs.params(), shape, minval=low, maxval=high)
    taps = lambda *shape: uniform(shape, -W ** -0.5, W ** -0.5)
    self.input, self.gate = (heads.project(
        'BTD,DNV->BTNV', config, heads=N, width=V, rngs=rngs)
        for _ in range(2))
    # B, C and dt are one product: P = 2 J M + N.
    self.select = Einsum(
        'BTD,DP->BTP', (config.n_embd, 2 * J * M + N), std=config.init_std,
        bias=config.bias, rngs=rngs)
    self.conv = param(taps(W, N * V), 'WE')
    self.conv_bias = param(taps(N * V), 'E')
    self.select_conv = param(taps(W, 2 * J * M), 'WP')
    self.select_conv_bias = param(taps(2 * J * M), 'P')
    self.dt_bias = param(dt_bias(rngs.params(), N), 'N', decay=False)
    self.A_log = param(jnp.log(uniform((N,), *A_RANGE)), 'N', decay=False)
    self.D = param(jnp.ones(N), 'N', decay=False)
    self.norm_weight = param(jnp.ones((N, V)), 'NV', decay=False)
    self.out = heads.out(config, heads=N, width=V, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    taps, select_taps, S = (None,) * 3 if state is None else state
    options, (_, J, M, N, V) = self.options, self.shape
    z, x, selected = self.gate(x), self.input(x), self.select(x)
    B_and_C, dt = jnp.split(selected, (2 * J * M,), axis=-1)
    x, taps = causal_conv1d(
        x.reshape(*x.shape[:2], N * V), self.conv[...], self.conv_bias[...],
        state=taps, starts=ctx.starts)
    B_and_C, select_taps = causal_conv1d(
        B_and_C, self.select_conv[...], self.select_conv_bias[...],
        state=select_taps, starts=ctx.starts)
    x = jax.nn.silu(x).reshape(z.shape)
    B, C = jnp.split(jax.nn.silu(B_and_C).reshape(
        *x.shape[:2], 2 * J, M), 2, axis=2)
    dt = jnp.clip(
        jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...]),
        options.mamba2_dt_at_least, options.mamba2_dt_at_most)
    ctx.record('step_size', lambda: dt)
    y, S = linear_attention(
        C, B, (x * dt[..., None]).astype(x.dtype), ctx, state=S,
        decay=-jnp.exp(self.A_log[...]) * dt,
        implementation=options.attention_kernel)
    y = (y + self.D[...][:, None] * x).astype(x.dtype)
    gate = jax.nn.silu(z)
    ctx.record('gate', lambda: gate)
    return self.out(self._norm(y * gate)), (taps, select_taps, S)

  def _norm(self, y):
    """RMSNorm [B,T,N,V] of each group of heads."""
    J = self.shape[1]
    groups = rms_normalize(y.reshape(*y.shape[:2], J, -1), eps=EPS)
    return groups.reshape(y.shape) * self.norm_weight[...].astype(y.dtype)

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    W, J, M, N, V = self.shape
    taps = lambda width: jnp.zeros((batch, W - 1, width), self.dtype)
    return taps(N * V), taps(2 * J * M), jnp.zeros((batch, N, M, V))

  def flops(self, length):
    del length  # Every token costs the same.
    W, J, M, N, V = self.shape
    dense = (self.input, self.gate, self.select, self.out)
    conv = 2 * W * (N * V + 2 * J * M)
    # Of the recurrence: a S, d B x^T added, and S^T C.
    return sum(e.flops for e in dense) + conv + 5 * N * M * V
