"""Weighted attention as it is defined: one query at a time."""

import jax
import jax.numpy as jnp

from attention.kernels.scores import fire as fire_rule


def weighted_attention(
    q, k, v, *, weigh, learned=(), scale, window=0, softcap=0.0,
    by_length=False, fire=None, fire_learned=None, bias=None, positions=None,
    segment_ids=None, q_offset=0):
  """`attention.kernels.scores.weighted_attention`, argument for argument."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  k, v = (jnp.repeat(x.astype(dtype), N // K, 2) for x in (k, v))
  j = jnp.arange(S)

  def query(t):
    i = t + q_offset
    s = scale * jnp.einsum('BNH,BSNH->BNS', q[:, t].astype(dtype), k)
    if softcap:
      s = softcap * jnp.tanh(s / softcap)
    if fire is not None:
      s += fire_rule.bias(
          fire, fire_learned, (i - j)[None], positions[:, t][:, None])[
              :, :, 0].astype(dtype)
    if bias is not None:
      row, column = (x.astype(dtype) for x in bias)
      s += jnp.sum(row[:, t][:, :, None] - jnp.swapaxes(column, 1, 2), -1)
    seen = (j <= i) & ((j > i - window) if window else True)
    seen = jnp.broadcast_to(seen, (B, 1, S))
    if segment_ids is not None:
      q_ids, kv_ids = segment_ids
      seen &= (kv_ids == q_ids[:, t][:, None])[:, None]
    w = weigh(jnp.where(seen, s, 0.0)[:, :, None], seen[:, :, None], *learned)
    if by_length:
      w /= jnp.maximum(seen.sum(-1), 1)[:, :, None, None]
    return jnp.einsum('BNS,BSNV->BNV', w[:, :, 0], v)

  y = jax.lax.map(query, jnp.arange(T))
  return jnp.moveaxis(y, 0, 1).astype(q.dtype)
