"""What softmax variants share between their projections: scores and cache."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common.bias import ForgetGate, alibi
from attention.common.ops import flash_attention, weighted_attention
from attention.common.weights import FireBias, Learned
from model.layers import param, rms_normalize, rotary

LEAST = 1e-24  # Of a squared length: what is zero has no direction.


def init_cache(shapes, *, batch, length, window, dtype, exact=()):
  """An empty cache of one array per entry of `shapes`, per-token shapes.

  Those in `exact` come after them, and are float32 whatever the dtype.

  It holds `length` tokens in the order in which they came, and `index` counts
  them; or with a window the last window - 1, oldest first: such a cache slides,
  and has no index. Empty slots have segment -1, which no token has.
  """
  slides = 0 < window <= length
  slots = window - 1 if slides else length
  return {
      'values': tuple(
          jnp.zeros((batch, slots, *s), kind)
          for group, kind in ((shapes, dtype), (exact, jnp.float32))
          for s in group),
      'segment_ids': jnp.full((batch, slots), -1, jnp.int32),
      'index': None if slides else jnp.zeros((), jnp.int32),
  }


def append(cache, values, segment_ids):
  """Adds T tokens to a cache.

  Args:
    cache: from init_cache. Tokens beyond its length overwrite the last ones:
      jit cannot know how many it holds, so that who calls must.
    values: the arrays of the new tokens, [B,T,...] each.
    segment_ids: int32 [B,T] of the new tokens, or None.

  Returns:
    (arrays to attend to, (query ids, key ids), q_offset, the new cache).
  """
  batch, T = values[0].shape[:2]
  if segment_ids is None:
    segment_ids = jnp.zeros((batch, T), jnp.int32)
  old = (*cache['values'], cache['segment_ids'])
  new = (*values, segment_ids)
  slots, index = old[0].shape[1], cache['index']
  if index is None:
    seen = [jnp.concatenate([o, n.astype(o.dtype)], 1)
            for o, n in zip(old, new)]
    kept, offset = [x[:, T:] for x in seen], slots
  else:
    if slots < T:
      raise ValueError(f'{T} tokens do not fit a state of length {slots}')
    offset, index = index, index + T
    seen = kept = [
        jax.lax.dynamic_update_slice_in_dim(o, n.astype(o.dtype), offset, 1)
        for o, n in zip(old, new)]
  cache = {'values': tuple(kept[:-1]), 'segment_ids': kept[-1], 'index': index}
  return seen[:-1], (segment_ids, seen[-1]), offset, cache


def recall(values, ctx, state, *, window):
  """What the tokens of a call may attend to: each other, or also a state.

  Args:
    values: arrays [B,T,...] of the tokens.
    ctx: the Context.
    state: a cache, or None. One that slides is a window, whatever `window`.
    window: tokens that a query sees, itself included, or 0: all.

  Returns:
    (arrays, what else `flash_attention` has to know of them, the state).
  """
  ids, q_offset = ctx.segment_ids, 0
  ids = None if ids is None else (ids, ids)
  if state is not None:
    if state['index'] is None:
      window = state['segment_ids'].shape[1] + 1
    values, ids, q_offset, state = append(state, values, ctx.segment_ids)
  return values, dict(segment_ids=ids, q_offset=q_offset, window=window), state


def visible(length, window):
  """Mean number of tokens that a token sees, itself included."""
  seen = min(window or length, length)
  return seen - seen * (seen - 1) / (2 * length)


def sink_param(config, options):
  """The learned lambda of the group Lobo: one, or one a head; else None."""
  if not options.use_flash_lobo:
    return None
  shape = (config.n_head,) * options.use_flash_lobo_per_head
  return param(jnp.full(shape, options.flash_lobo_log_const),
               'N' * len(shape), decay=False)


def sink_values(log_sink, options, n_head):
  """lambda of every query head, float32 [N], or None.

  Args:
    log_sink: what `sink_param` made of the options.
    options: they have the group Lobo.
    n_head: N.
  """
  if log_sink is not None:
    return jnp.broadcast_to(log_sink[...], (n_head,))
  if options.use_flash_obo_const:
    return jnp.full((n_head,), options.flash_lobo_log_const)
  return None


def place(q, k, ctx, options):
  """q and k [B,T,N,H] rotated and normalised, where the options say so.

  Args:
    q, k: of any numbers of heads.
    ctx: the Context, for the positions.
    options: they have the groups Rotary and PlainQKNorm.
  """
  if options.use_rotary_embeddings:
    q, k = (rotary(x, ctx.positions, base=options.rope_base,
                   fraction=options.rope_fraction) for x in (q, k))
  if options.use_qk_norm:
    q, k = rms_normalize(q), rms_normalize(k)
  return q, k


def exclude(y, v):
  """Heads without what is along their token's own value.

  Exclusive self attention, Zhai 2026 (https://arxiv.org/abs/2603.09078):
  y - (y . u) u in float32, u = v / |v|; where v is zero, y itself.

  Args:
    y: [B,T,N,V].
    v: [B,T,K,V], of the tokens of y.

  Returns:
    [B,T,N,V], in y's dtype.
  """
  B, T, K, V = v.shape
  groups = y.astype(jnp.float32).reshape(B, T, K, -1, V)
  own = v.astype(jnp.float32)[:, :, :, None]
  own *= jax.lax.rsqrt(
      jnp.maximum((own * own).sum(-1, keepdims=True), LEAST))
  along = (groups * own).sum(-1, keepdims=True)
  return (groups - along * own).reshape(y.shape).astype(y.dtype)


class Softmax(nnx.Module):
  """Rotary, qk norm, softcap, window, weights and bias, over given q, k, v.

  `options` has the groups Rotary, QKNorm, Softcap, Window and Exclusive of
  attention.common.options, and Weights of attention.common.weights.
  """

  def __init__(self, config, options, *, kv_shape, value_width, rngs):
    N = config.n_head
    self.options = options
    self.implementation = options.implementation
    self.n_head = N
    self.dtype = config.compute_dtype
    self.shapes = (kv_shape, (kv_shape[0], value_width))
    self.softcap, self.window = options.softcap, options.window
    # Henry et al. 2020, section 3.2; a length of 1 has nothing to tell apart.
    length = config.block_size
    self.g = param(
        math.log2(max(length * length - length, 2)), '', decay=False
    ) if options.use_qk_norm_scale else None
    self.log_sink = sink_param(config, options)
    self.learned = Learned(options, n_head=N)
    self.fire = FireBias(
        options, n_head=N, rngs=rngs) if options.use_fire_embeddings else None
    self.forget = ForgetGate(
        config, options, rngs=rngs) if options.use_forget_gate else None

  def __call__(self, q, k, v, ctx, state=None, *, x):
    """[B,T,N,H], [B,T,K,H], [B,T,K,V] -> ([B,T,N,V], state).

    x [B,T,D] is what q, k and v were made of.
    """
    options, scale = self.options, q.shape[-1] ** -0.5
    q, k = place(q, k, ctx, options)
    if self.g is not None:
      # |rms_normalize(q)| = sqrt(H), so that s = g cos(q, k).
      q, scale = q * self.g[...].astype(q.dtype), 1 / q.shape[-1]
    own = v
    forgotten = () if self.forget is None else (self.forget(x, ctx, state),)
    (k, v, *columns), visible_to, state = recall(
        (k, v, *forgotten), ctx, state, window=self.window)
    biases = [*zip(forgotten, columns)]
    if options.use_alibi:
      biases.append(alibi(
          self.n_head, batch=q.shape[0], queries=q.shape[1], keys=k.shape[1],
          q_offset=visible_to['q_offset']))
    if biases:
      visible_to |= dict(
          bias=tuple(jnp.concatenate(x, -1) for x in zip(*biases)))
    y = self._attend(q, k, v, ctx, visible_to, scale)
    return exclude(y, own) if options.attn_xsa else y, state

  def _attend(self, q, k, v, ctx, visible_to, scale):
    options = self.options
    sink = sink_values(self.log_sink, options, self.n_head)
    if options.fused:
      return flash_attention(
          q, k, v, ctx, **visible_to, sink=sink,
          scale=scale * options.log_base,
          softcap=self.softcap * options.log_base,
          implementation=self.implementation)
    fire = self.fire
    return weighted_attention(
        q, k, v, ctx, **visible_to, scale=scale, softcap=self.softcap,
        weigh=options.weigh, by_length=options.div_by_seq_len,
        learned=self.learned() if sink is None else (sink,),
        fire=None if fire is None else fire.rule,
        fire_learned=None if fire is None else fire(),
        implementation=self.implementation)

  def init_state(self, batch, length):
    return init_cache(
        self.shapes, batch=batch, length=length, window=self.window,
        dtype=self.dtype,
        exact=() if self.forget is None else ((self.n_head, 2),))

  def flops(self, length):
    """Forward, per token: two products with the visible ones, and gates."""
    widths = self.shapes[0][-1] + self.shapes[1][-1]
    gates = 0 if self.forget is None else self.forget.logit.flops
    return gates + 2 * self.n_head * widths * visible(length, self.window)
