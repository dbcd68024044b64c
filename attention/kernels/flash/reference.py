"""The specification of flash_attention: every score, float32, autodiff.

It exists to be read and compared with, and is never dispatched to.
"""

import jax
import jax.numpy as jnp


def attention(q, k, v, *, scale, causal=True, window=0, softcap=0.0,
              segment_ids=None, sink=None, bias=None, q_offset=0):
  """See flash_attention. Computes in float32, or float64 if q is that."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  grouped = q.astype(dtype).reshape(B, T, K, N // K, H)
  s = scale * jnp.einsum('BTKGH,BSKH->BKGTS', grouped, k.astype(dtype))
  s = s.reshape(B, N, T, S)
  if softcap:
    s = softcap * jnp.tanh(s / softcap)
  if bias is not None:
    row, column = (jnp.swapaxes(x.astype(dtype), 1, 2) for x in bias)
    s += jnp.sum(row[:, :, :, None] - column[:, :, None], axis=-1)

  position = jnp.arange(T)[:, None] + q_offset
  key = jnp.arange(S)[None, :]
  seen = jnp.ones((B, 1, T, S), bool)
  if causal:
    seen &= key <= position
  if window:
    seen &= key > position - window
  if segment_ids is not None:
    pair = isinstance(segment_ids, (tuple, list))
    q_ids, kv_ids = segment_ids if pair else (segment_ids, segment_ids)
    seen &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]

  # What is not finite is replaced before exp and log, not after: a gradient
  # that meets inf - inf is NaN even where its value is thrown away.
  empty = ~jnp.any(seen, axis=-1)
  top = jnp.max(s, axis=-1, where=seen, initial=-jnp.inf)
  top = jax.lax.stop_gradient(jnp.where(empty, 0.0, top))
  e = jnp.where(seen, jnp.exp(jnp.where(seen, s - top[..., None], 0.0)), 0.0)
  total = jnp.where(empty, 1.0, jnp.sum(e, axis=-1))
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  p = e / total[..., None]
  if sink is not None:
    finite = jnp.where(empty, 0.0, lse)
    weight = jax.nn.sigmoid(finite - sink.astype(dtype)[:, None])
    p *= weight[..., None]
  p = p.reshape(B, K, N // K, T, S)
  out = jnp.einsum('BKGTS,BSKV->BTKGV', p, v.astype(dtype))
  return out.reshape(B, T, N, -1).astype(q.dtype), lse
