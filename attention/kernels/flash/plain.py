"""Attention that stores its scores: what --disable_flash_attention runs.

The softmax is in float32, the matmuls take the input dtype and accumulate in
float32. O(T S) memory.
"""

import jax.numpy as jnp


def check(q, k, v, *, scale, causal, window, softcap, segment_ids, sink,
          q_offset):
  """Declines nothing."""
  del q, k, v, scale, causal, window, softcap, segment_ids, sink, q_offset


def forward(q, k, v, q_ids, kv_ids, q_offset, *, scale, causal, window,
            softcap):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  s, seen, _ = _scores(q, k, q_ids, kv_ids, q_offset, scale, causal, window,
                       softcap)
  top = jnp.max(s, axis=-1, where=seen, initial=-jnp.inf)
  top = jnp.where(jnp.isneginf(top), 0.0, top)
  e = jnp.where(seen, jnp.exp(s - top[..., None]), 0.0)
  total = jnp.sum(e, axis=-1)
  out = _matmul('BKGTS,BSKV->BTKGV', e.astype(v.dtype), v)
  # Dividing here, not before the product, is T S divisions fewer.
  out /= jnp.moveaxis(jnp.where(total == 0, 1.0, total), 3, 1)[..., None]
  B, T, N, _ = q.shape
  lse = (top + jnp.log(total)).reshape(B, N, T)
  return out.reshape(B, T, N, -1).astype(q.dtype), lse


def backward(q, k, v, q_ids, kv_ids, q_offset, dout, lse, delta, *, scale,
             causal, window, softcap):
  """Returns the gradients of q, k and v; see the package."""
  s, seen, dcap = _scores(q, k, q_ids, kv_ids, q_offset, scale, causal, window,
                          softcap)
  B, K, G, T, _ = s.shape
  dout = dout.reshape(B, T, K, G, -1)
  grouped = q.reshape(B, T, K, G, -1)
  lse = lse.reshape(B, K, G, T, 1)
  delta = delta.reshape(B, K, G, T, 1)
  p = jnp.where(seen, jnp.exp(s - lse), 0.0)
  dp = _matmul('BTKGV,BSKV->BKGTS', dout, v)
  ds = (p * (dp - delta) * dcap * scale).astype(q.dtype)
  dq = _matmul('BKGTS,BSKH->BTKGH', ds, k).reshape(q.shape)
  dk = _matmul('BKGTS,BTKGH->BSKH', ds, grouped)
  dv = _matmul('BKGTS,BTKGV->BSKV', p.astype(q.dtype), dout)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def visible(row, column, q_ids, kv_ids, causal, window):
  """Who sees whom, [T,S], or [B,1,1,T,S] with segments; broadcasts.

  Args:
    row: [T] positions of the queries, counted from the first key.
    column: [S] positions of the keys.
    q_ids: [B,T] or None.
    kv_ids: [B,S] or None.
    causal: bool.
    window: 0 or the number of tokens seen.
  """
  row, column = row[:, None], column[None, :]
  seen = jnp.ones((row.shape[0], column.shape[1]), bool)
  if causal:
    seen &= column <= row
  if window:
    seen &= column > row - window
  if q_ids is not None:
    same = q_ids[:, :, None] == kv_ids[:, None, :]
    seen = seen & same[:, None, None]
  return seen


def _scores(q, k, q_ids, kv_ids, q_offset, scale, causal, window, softcap):
  """Scores [B,K,G,T,S], the mask, and d(capped score) / d(score)."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  s = _matmul('BTKGH,BSKH->BKGTS', q.reshape(B, T, K, N // K, H), k) * scale
  slope = 1.0
  if softcap:
    bounded = jnp.tanh(s / softcap)
    s, slope = softcap * bounded, 1 - bounded * bounded
  seen = visible(jnp.arange(T) + q_offset, jnp.arange(S), q_ids, kv_ids,
                 causal, window)
  return s, seen, slope


def _matmul(equation, a, b):
  return jnp.einsum(equation, a, b,
                    preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
