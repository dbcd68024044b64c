"""What softmax variants share between their projections: scores and cache."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from attention.common.heads import head_shards
from attention.kernels.flash import flash_attention
from model.layers import param, rms_normalize, rotary


def attend(q, k, v, ctx, *, segment_ids=None, q_offset=0, sink=None, **kwargs):
  """flash_attention on the mesh: batch over data and fsdp, heads over tensor.

  Where the mesh has more tensor shards than there are K heads, every shard
  holds the one head that its queries need.

  Args:
    q, k, v: [B,T,N,H], [B,S,K,H], [B,S,K,V].
    ctx: the Context.
    segment_ids: None or the pair (of queries [B,T], of keys [B,S]).
    q_offset: as in flash_attention.
    sink: float32 [N] or None.
    **kwargs: passed on to flash_attention.

  Returns:
    [B,T,N,V].
  """
  N, K = q.shape[2], k.shape[2]
  shards = head_shards(ctx, N)
  if K % shards:
    if shards % K:
      raise ValueError(f'mesh_tensor ({shards}) must be a multiple or a '
                       f'divisor of the {K} key/value heads')
    k, v = (jnp.repeat(x, shards // K, axis=2) for x in (k, v))
  heads = ('batch', None, 'heads', None)
  q_ids, kv_ids = (None, None) if segment_ids is None else segment_ids

  def local(q, k, v, q_ids, kv_ids, sink, q_offset):
    ids = None if q_ids is None else (q_ids, kv_ids)
    return flash_attention(
        q, k, v, segment_ids=ids, sink=sink, q_offset=q_offset, **kwargs)[0]

  if isinstance(q_offset, int):  # Static: the kernel can plan its blocks.
    static = q_offset
    run = lambda *args: local(*args, static)
    return ctx.sharded(
        run, inputs=(heads,) * 3 + (('batch', None),) * 2 + (('heads',),),
        outputs=heads)(q, k, v, q_ids, kv_ids, sink)
  return ctx.sharded(
      local, inputs=(heads,) * 3 + (('batch', None),) * 2 + (('heads',), ()),
      outputs=heads)(q, k, v, q_ids, kv_ids, sink, q_offset)


def init_cache(shapes, *, batch, length, window, dtype):
  """An empty cache of one array per entry of `shapes`, per-token shapes.

  With a window, the last window - 1 tokens are kept, oldest first; else all
  `length` of them, in the order in which they came. Empty slots have segment
  -1, which no token has.
  """
  slots = length if not window else min(length, window - 1)
  return {
      'values': tuple(jnp.zeros((batch, slots, *s), dtype) for s in shapes),
      'segment_ids': jnp.full((batch, slots), -1, jnp.int32),
      'index': jnp.zeros((), jnp.int32),
  }


def append(cache, values, segment_ids, *, window):
  """Adds T tokens to a cache.

  Args:
    cache: from init_cache.
    values: the arrays of the new tokens, [B,T,...] each.
    segment_ids: int32 [B,T] of the new tokens, or None.
    window: the window of init_cache, a number of tokens or 0.

  Returns:
    (arrays to attend to, (query ids, key ids), q_offset, the new cache).
  """
  batch, T = values[0].shape[:2]
  if segment_ids is None:
    segment_ids = jnp.zeros((batch, T), jnp.int32)
  old = (*cache['values'], cache['segment_ids'])
  new = (*values, segment_ids)
  slots = old[0].shape[1]
  if window and slots == window - 1:
    seen = [jnp.concatenate([o, n.astype(o.dtype)], 1)
            for o, n in zip(old, new)]
    kept, offset = [x[:, T:] for x in seen], slots
  else:
    if slots < T:
      raise ValueError(f'{T} tokens do not fit a state of length {slots}')
    offset = cache['index']
    seen = kept = [
        jax.lax.dynamic_update_slice_in_dim(o, n.astype(o.dtype), offset, 1)
        for o, n in zip(old, new)]
  cache = {'values': tuple(kept[:-1]), 'segment_ids': kept[-1],
           'index': cache['index'] + T}
  return seen[:-1], (segment_ids, seen[-1]), offset, cache


def recall(values, ctx, state, *, window):
  """What the tokens of a call may attend to: each other, or also a state.

  Args:
    values: arrays [B,T,...] of the tokens.
    ctx: the Context.
    state: a cache, or None.
    window: as in init_cache.

  Returns:
    (arrays, segment_ids and q_offset for `attend`, the new state).
  """
  if state is not None:
    return append(state, values, ctx.segment_ids, window=window)
  ids = ctx.segment_ids
  return values, None if ids is None else (ids, ids), 0, None


def visible(length, window):
  """Mean number of tokens that a token sees, itself included."""
  seen = min(window or length, length)
  return seen - seen * (seen - 1) / (2 * length)


def softcap_of(options):
  """The bound of the group Softcap, 0.0 where there is none."""
  softcap = options.attn_logit_softcapping or 0.0
  if softcap < 0:
    raise ValueError(f'attn_logit_softcapping ({softcap}) must be positive, '
                     'or none for no cap')
  return softcap


def window_of(options):
  """The window of the group Window, 0 where there is none."""
  window = options.window_size or 0
  if window < 0:
    raise ValueError(f'window_size ({window}) must be positive, or none for '
                     'no window')
  return window


def sink_param(config, options):
  """The learned lambda of the group Lobo: one, or one a head; else None."""
  learned, constant = options.use_flash_lobo, options.use_flash_obo_const
  if learned and constant:
    raise ValueError('use_flash_lobo learns lambda, use_flash_obo_const '
                     'fixes it: drop one of them')
  if options.use_flash_lobo_per_head and constant:
    raise ValueError('use_flash_lobo_per_head contradicts '
                     'use_flash_obo_const, one constant: drop one of them')
  if options.use_flash_lobo_per_head and not learned:
    raise ValueError('use_flash_lobo_per_head needs use_flash_lobo')
  if options.flash_lobo_log_const and not (learned or constant):
    raise ValueError(
        f'flash_lobo_log_const ({options.flash_lobo_log_const}) has no '
        'effect without use_flash_lobo or use_flash_obo_const')
  if not learned:
    return None
  shape = (config.n_head,) if options.use_flash_lobo_per_head else ()
  axes = ('heads',) * len(shape)
  return param(jnp.full(shape, options.flash_lobo_log_const), *axes,
               decay=False)


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


class Softmax(nnx.Module):
  """Rotary, qk norm, softcap, window, off-by-one softmax, over given q, k, v.

  `options` has the groups Flash, Rotary, QKNorm, Softcap, Window and Lobo of
  attention.common.options.
  """

  def __init__(self, config, options, *, kv_shape, value_width):
    N = config.n_head
    self.options = options
    self.implementation = options.implementation
    self.n_head = N
    self.dtype = config.compute_dtype
    self.shapes = (kv_shape, (kv_shape[0], value_width))
    self.softcap, self.window = softcap_of(options), window_of(options)
    self.g = self._scale(config) if options.use_qk_norm_scale else None
    self.log_sink = sink_param(config, options)

  def _scale(self, config):
    if not self.options.use_qk_norm:
      raise ValueError('use_qk_norm_scale needs use_qk_norm: it scales the '
                       'cosine that the norm makes of the score')
    length = config.block_size
    # Henry et al. 2020, section 3.2; a length of 1 has nothing to tell apart.
    return param(math.log2(max(length * length - length, 2)), decay=False)

  def __call__(self, q, k, v, ctx, state=None):
    """[B,T,N,H], [B,T,K,H], [B,T,K,V] -> ([B,T,N,V], state)."""
    options, scale = self.options, q.shape[-1] ** -0.5
    if options.use_rotary_embeddings:
      q, k = (rotary(x, ctx.positions, base=options.rope_base) for x in (q, k))
    if options.use_qk_norm:
      q, k = rms_normalize(q), rms_normalize(k)
    if self.g is not None:
      # |rms_normalize(q)| = sqrt(H), so that s = g cos(q, k).
      q, scale = q * self.g[...].astype(q.dtype), 1 / q.shape[-1]
    (k, v), segment_ids, q_offset, state = recall(
        (k, v), ctx, state, window=self.window)
    y = attend(
        q, k, v, ctx, segment_ids=segment_ids, q_offset=q_offset,
        sink=sink_values(self.log_sink, options, self.n_head), scale=scale,
        softcap=self.softcap, window=self.window,
        implementation=self.implementation)
    return y, state

  def init_state(self, batch, length):
    return init_cache(self.shapes, batch=batch, length=length,
                      window=self.window, dtype=self.dtype)

  def flops(self, length):
    """Forward, per token, of the two products with the visible tokens."""
    widths = self.shapes[0][-1] + self.shapes[1][-1]
    return 2 * self.n_head * widths * visible(length, self.window)
