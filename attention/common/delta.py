"""What the variants of the delta rule share: all but their decays and gates."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.ops import delta_rule
from attention.common.options import option
from attention.common.short_conv import ShortConv
from attention.common.step_sizes import dt_bias
from model.layers import Einsum, RMSNorm, param

A_RANGE = (1.0, 16.0)  # Of the rates of decay at first.
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Delta(flags.Kernel):
  delta_beta_max: float = option(
      1.0, 'largest beta; above 1 the state has negative eigenvalues, which '
      'parity and permutations need', at_least=1, at_most=2)
  delta_expand_v: int = option(
      1, 'width of a value head, in units of n_embd / n_head', at_least=1,
      scales_state='width')
  delta_conv_kernel_size: int = option(
      4, 'tokens that the convolutions of q, k and v see, themselves included',
      at_least=1)


def l2_normalize(x):
  """x / |x| over the last axis, computed in float32."""
  y = x.astype(jnp.float32)
  scale = jax.lax.rsqrt((y * y).sum(-1, keepdims=True) + EPS)
  return (y * scale).astype(x.dtype)


class DeltaLayer(nnx.Module):
  """A layer of the delta rule, given its decay and its gate.

    q, k, v = silu(conv(x W)), q and k of length 1   b = beta_max sigmoid(x W_b)
    S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T
    y = W_O (RMSNorm(S_t^T q_t / sqrt(H)) * activation(gate(x)))
  """

  def __init__(self, config, options, *, decay, gate, activation, rngs):
    """As Attention, and:

    Args:
      decay: module from x to the op's decay, or None.
      gate: module from x to heads [B,T,N,V].
      activation: of the gate.
    """
    N, H, V = self.shape = sizes(config, options)
    self.options, self.activation = options, activation
    self.query, self.key, self.value = heads.qkv(
        config, groups=N, widths=(H, V), rngs=rngs)
    self.convs = nnx.List([
        ShortConv(heads=N, width=width, taps=options.delta_conv_kernel_size,
                  dtype=config.compute_dtype, rngs=rngs)
        for width in (H, H, V)])
    self.beta = Einsum(
        'BTD,DN->BTN', (config.n_embd, N), std=config.init_std, rngs=rngs)
    self.decay, self.gate = decay, gate
    self.norm = RMSNorm(V)
    self.out = heads.out(config, heads=N, width=V, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    taps, S = ((None,) * 3, None) if state is None else state
    (q, k, v), taps = zip(*(
        conv(project(x), ctx, tap) for project, conv, tap in zip(
            (self.query, self.key, self.value), self.convs, taps)))
    beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
    y, S = delta_rule(
        l2_normalize(q) * q.shape[-1] ** -0.5, l2_normalize(k), v, ctx,
        beta=self.options.delta_beta_max * beta,
        decay=None if self.decay is None else self.decay(x), state=S,
        implementation=self.options.attention_kernel)
    y = self.norm(y)
    gate = self.activation(self.gate(x))
    ctx.record('gate', lambda: gate)
    return self.out(y * gate), (taps, S)

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    return (tuple(conv.init_state(batch) for conv in self.convs),
            jnp.zeros((batch, *self.shape)))

  def flops(self, length):
    del length  # Every token costs the same.
    N, H, V = self.shape
    parts = (self.query, self.key, self.value, self.beta, self.decay,
             self.gate, self.out, *self.convs)
    # Of the recurrence: a S, what it has for k, k u^T added, and q S.
    return sum(p.flops for p in parts if p is not None) + 7 * N * H * V


def sizes(config, options):
  """(N, H, V)."""
  H = heads.head_width(config)
  return config.n_head, H, options.delta_expand_v * H


def full_gate(config, options, *, rngs):
  """A gate with a matrix of its own."""
  N, _, V = sizes(config, options)
  return heads.project('BTD,DNV->BTNV', config, heads=N, width=V, rngs=rngs)


class HeadDecay(nnx.Module):
  """log a = -A softplus(x W + b), of each head: float32 [B,T,N]."""

  def __init__(self, config, *, rngs):
    N = config.n_head
    self.project = Einsum(
        'BTD,DN->BTN', (config.n_embd, N), std=config.init_std, rngs=rngs)
    self.A_log = param(_rates(rngs, N), 'N', decay=False)
    self.dt_bias = param(dt_bias(rngs.params(), N), 'N', decay=False)
    self.flops = self.project.flops

  def __call__(self, x):
    dt = self.project(x).astype(jnp.float32) + self.dt_bias[...]
    return -jnp.exp(self.A_log[...]) * jax.nn.softplus(dt)


class ChannelDecay(nnx.Module):
  """The same of each channel of the keys, W of rank H: float32 [B,T,N,H]."""

  def __init__(self, config, *, rngs):
    N, H = config.n_head, heads.head_width(config)
    self.project = LowRank(config, width=H, rank=H, rngs=rngs)
    self.A_log = param(_rates(rngs, N), 'N', decay=False)
    # From decays that forget at once to those that keep: with all alike, heads
    # do not learn to recall.
    self.dt_bias = param(
        dt_bias(rngs.params(), N * H).reshape(N, H), 'NH', decay=False)
    self.flops = self.project.flops

  def __call__(self, x):
    dt = self.project(x).astype(jnp.float32) + self.dt_bias[...]
    return -jnp.exp(self.A_log[...])[:, None] * jax.nn.softplus(dt)


class LowRank(nnx.Module):
  """x W_1 W_2, [B,T,D] to heads [B,T,N,width], W_1 [D,rank]."""

  def __init__(self, config, *, width, rank, rngs, bias=False):
    dense = dict(std=config.init_std, rngs=rngs)
    self.down = Einsum('BTD,DR->BTR', (config.n_embd, rank), **dense)
    self.up = Einsum('BTR,RNH->BTNH', (rank, config.n_head, width), bias=bias,
                     **dense)
    self.flops = self.down.flops + self.up.flops

  def __call__(self, x):
    return self.up(self.down(x))


def _rates(rngs, n_head):
  """The logarithms of A [N], uniform in A_RANGE."""
  return jnp.log(jax.random.uniform(
      rngs.params(), (n_head,), minval=A_RANGE[0], maxval=A_RANGE[1]))
