"""Retention (RetNet, Sun et al. 2023, https://arxiv.org/abs/2307.08621).

  q, k, v = rotary(x W_q), rotary(x W_k), x W_v
  S_t = a_t S_{t-1} + k_t v_t^T           y_t = q_t^T S_t / sqrt(H)
  out = (silu(x W_g) * y / rms(y)) W_o    rms of each head by itself, unweighted

RetNet's rotation, xPos with the decay taken out into a_t, is plain rotary. Its
norms of q k^T and of the decays only keep half precision in range: behind the
norm of y, as in torchscale, they change nothing. The decays a_t of head n, of
1..N, are by retention_decay

  fixed      1 - 2^(-4 - n), RetNet
  lightning  exp(-2^(-8 n / N)), the slopes of Lightning Attention-2 (Qin et al.
             2024, https://arxiv.org/abs/2401.04658) and MiniMax-01
  data       sigmoid(x_t w + b)^(1/16), YOCO's gated retention (Sun et al. 2024,
             https://arxiv.org/abs/2405.05254), also called simple GLA

all to the power of retention_decay_power. A published lightning model lowers it
from 1 to 0 with depth; layers that are scanned do not know theirs, so that
attention_list says it. Time O(T) in chunks; the state is S in float32, N H V
numbers however many tokens it has seen.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads
from attention.common import options as flags
from attention.common.ops import linear_attention
from attention.common.options import option
from model.layers import Einsum, rms_normalize, rotary

TEMPERATURE = 16.0  # Of the gates: they start at 0.96.
# A document's first y is a multiple of its v, of either sign and any size: the
# norm's slope there is up to 1 / sqrt(eps). GroupNorm's.
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Options(flags.RopeBase, flags.Kernel):
  retention_decay: str = option(
      'fixed', "decays: RetNet's, those of lightning attention, or a gate that "
      'the token sets', choices=('fixed', 'lightning', 'data'))
  retention_decay_power: float = option(
      1.0, 'power that the decays are taken to; 0: none decays', at_least=0)
  retention_expand_v: int = option(
      2, 'width of a value head, in units of n_embd / n_head', at_least=1,
      scales_state='width')


def log_decays(kind, n_head):
  """Logarithms of the constant decays of every head, float32 [N]."""
  n = jnp.arange(1.0, n_head + 1)
  if kind == 'lightning':
    return -jnp.exp2(-8 * n / n_head)
  return jnp.log1p(-jnp.exp2(-4 - n))


class Attention(nnx.Module):

  def __init__(self, config, options, *, rngs):
    N, H = config.n_head, heads.head_width(config)
    V = options.retention_expand_v * H
    self.options, self.shape = options, (N, H, V)
    self.query, self.key, self.value = heads.qkv(
        config, groups=N, widths=(H, V), rngs=rngs)
    self.gate = heads.project(
        'BTD,DNV->BTNV', config, heads=N, width=V, rngs=rngs)
    self.decay = Einsum(
        'BTD,DN->BTN', (config.n_embd, N), std=config.init_std, bias=True,
        rngs=rngs) if options.retention_decay == 'data' else None
    self.out = heads.out(config, heads=N, width=V, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    options, H = self.options, self.shape[1]
    q, k = (rotary(e(x), ctx.positions, base=options.rope_base)
            for e in (self.query, self.key))
    y, state = linear_attention(
        q * H ** -0.5, k, self.value(x), ctx, decay=self._log_decay(x),
        state=state, implementation=options.attention_kernel)
    y = rms_normalize(y, eps=EPS)
    gate = jax.nn.silu(self.gate(x))
    ctx.record('gate', lambda: gate)
    return self.out(y * gate), state

  def _log_decay(self, x):
    """float32, [N] or of every token [B,T,N]."""
    options, N = self.options, self.shape[0]
    if self.decay is None:
      logs = log_decays(options.retention_decay, N)
    else:
      gate = self.decay(x).astype(jnp.float32)
      logs = jax.nn.log_sigmoid(gate) / TEMPERATURE
    return options.retention_decay_power * logs

  def init_state(self, batch, length):
    del length  # Any number of tokens fits.
    return jnp.zeros((batch, *self.shape))

  def flops(self, length):
    del length  # Every token costs the same.
    dense = (self.query, self.key, self.value, self.gate, self.out, self.decay)
    N, H, V = self.shape
    # Of the recurrence: a S, k v^T added, and q S.
    return sum(e.flops for e in dense if e is not None) + 5 * N * H * V
