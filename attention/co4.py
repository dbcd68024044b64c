"""Co4: latent queries and triadic modulation (Adeel 2025).

  for each of triadic_loops:                https://arxiv.org/abs/2505.06257
    C_t   = mean_{s <= t} (K_s + V_s) / 2
    Q_t,l = MOD(Q_t,l, C_t)                 at first the learned latent l
    K_t   = MOD(K_t, (mean_l Q_t,l + V_t) / 2)
    V_t   = MOD(V_t, (mean_l Q_t,l + K_t) / 2)
  y_t = W_O mean_l sum_{s <= t} softmax_s(s_l,ts) V_s

with K = W_K x and V = W_V x in heads of width H; all but the projections is
float32. As published, means and softmax are over the whole sequence, and all
tokens get the same output, which sees the future. co4_mode makes it causal:

  streaming  s_l,ts = Q_s,l . K_s / sqrt(H): a token is scored when it comes,
             and the softmax is a running one. Time O(n_latent T); a constant
             state, D (n_latent + triadic_loops) + 2 n_latent n_head numbers.
  exact      s_l,ts = Q_t,l . K_s / sqrt(H): every token asks all earlier ones
             anew. Time O(n_latent T^2); the state adds keys and values, 2 D
             numbers a token. Without loops the same as streaming.

co4_mode=bidirectional, the published form within a segment, is for encoders.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common import heads, ops, softmax, triadic
from attention.common import options as flags
from attention.common.options import option
from model.layers import param


@dataclasses.dataclass(frozen=True)
class Options(flags.Softcap, flags.Lobo, flags.Flash):
  n_latent: int = option(
      4, 'latent queries', at_least=1, scales_state='width')
  triadic_loops: int = option(
      1, 'passes in which queries, keys and values modulate each other',
      at_least=0, at_most=100)
  mod_fn: str = option(
      'cooperation', 'how a context modulates', choices=tuple(triadic.MODS))
  co4_mode: str = option(
      'streaming', 'streaming: linear time; exact: quadratic; bidirectional: '
      'for encoders alone', choices=('streaming', 'exact', 'bidirectional'))


class Attention(nnx.Module):
  """The causal modes."""

  modes: tuple = ('streaming', 'exact')

  def __init__(self, config, options, *, rngs):
    triadic.check(options, self.modes)
    D, N, H = config.n_embd, config.n_head, heads.head_width(config)
    self.options, self.dtype = options, config.compute_dtype
    self.shape = options.n_latent, N, H
    self.settings = triadic.Settings(
        options.mod_fn, options.triadic_loops, options.softcap,
        options.implementation)
    self.latent = param(
        D ** -0.5 * jax.random.normal(rngs.params(), self.shape), 'QNH')
    self.key, self.value = (
        heads.project(equation, config, heads=N, width=H, rngs=rngs)
        for equation in ('BTD,DNH->BTNH', 'BTD,DNV->BTNV'))
    self.log_sink = softmax.sink_param(config, options)
    self.out = heads.out(config, heads=N, width=H, rngs=rngs)

  def __call__(self, x, ctx, state=None):
    stream, cache = state or (self._stream(len(x)), None)
    inputs = (self.key(x), self.value(x), ctx.starts, *stream)
    if self.options.co4_mode == 'exact':
      qkv, stream = self._run(
          triadic.exact, ctx, inputs, outputs=(triadic.QKV, triadic.MEANS))
      y, cache = self._attend(*qkv, ctx, cache)
    else:
      y, stream = self._run(triadic.streaming, ctx, inputs,
                            outputs=('BTNV', triadic.STREAM))
      if ctx.tape is not None:
        self._record(ctx, inputs)
    return self.out(y.astype(x.dtype)), (stream, cache)

  def _run(self, fn, ctx, inputs, *, outputs):
    """A function of `triadic` on the mesh: batch by batch, head by head."""
    letters = (*triadic.INPUTS, *triadic.STREAM)[:2 + len(inputs)]
    return ctx.sharded(
        functools.partial(fn, self.settings), inputs=letters, outputs=outputs,
    )(self.latent[...], self._sink(), *inputs)

  def _record(self, ctx, inputs):
    """Records the running softmax: attention whose keys are the scores."""
    (s, v), _ = self._run(triadic.scored, ctx, inputs,
                          outputs=(triadic.SCORED, triadic.MEANS))
    k = s.reshape(*s.shape[:2], -1, 1)
    ids = ctx.segment_ids
    ops.flash_attention(
        jnp.ones_like(k), k, jnp.repeat(v, s.shape[3], 2), ctx, scale=1.0,
        segment_ids=None if ids is None else (ids, ids), sink=self._sinks(),
        implementation='plain')

  def _attend(self, q, k, v, ctx, cache):
    """The latent queries of a head attend as a group of query heads."""
    (k, v), visible_to, cache = softmax.recall((k, v), ctx, cache, window=0)
    B, T, N, Q, H = q.shape
    sink = self._sinks()
    y = ops.flash_attention(
        q.reshape(B, T, N * Q, H), k, v, ctx, **visible_to, sink=sink,
        scale=H ** -0.5, softcap=self.settings.softcap,
        implementation=self.settings.implementation)
    return y.reshape(B, T, N, Q, H).mean(3), cache

  def _sink(self):
    return softmax.sink_values(self.log_sink, self.options, self.shape[1])

  def _sinks(self):
    """That of every head, for all of its latent queries."""
    sink = self._sink()
    return None if sink is None else jnp.repeat(sink, self.shape[0])

  def _stream(self, batch):
    return triadic.empty_stream(
        batch, self.shape, loops=self.options.triadic_loops,
        pooled=self.options.co4_mode == 'streaming')

  def init_state(self, batch, length):
    cache, shape = None, self.shape[1:]
    if self.options.co4_mode == 'exact':
      cache = softmax.init_cache((shape, shape), batch=batch, length=length,
                                 window=0, dtype=self.dtype)
    return self._stream(batch), cache

  def flops(self, length):
    """Forward, per token: projections, and every latent's score and value."""
    scored = 1 if self.options.co4_mode != 'exact' else softmax.visible(
        length, 0)
    dense = self.key.flops + self.value.flops + self.out.flops
    return dense + 4 * math.prod(self.shape) * scored


class Encoder(Attention):
  """The bidirectional form, in time O(n_latent T), for no language model."""

  modes = ('bidirectional',)

  def __call__(self, x, ctx, state=None):
    if state is not None:
      raise ValueError('co4_mode=bidirectional has no state: give all at once')
    y = self._run(triadic.bidirectional, ctx,
                  (self.key(x), self.value(x), ctx.starts),
                  outputs='BTNV')
    return self.out(y.astype(x.dtype)), None
