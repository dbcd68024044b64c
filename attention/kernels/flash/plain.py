"""Attention that stores its scores: what --disable_flash_attention runs.

The softmax is in float32, the matmuls take the input dtype and accumulate in
float32. O(T S) memory.
"""

import functools
import operator

import jax
import jax.numpy as jnp


def check(operands, rule):
  """Declines nothing."""
  del operands, rule


def forward(operands, rule):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  q, k, v, *_ = operands
  B, T, N, _ = q.shape
  K = k.shape[2]
  s, seen, _ = _scores(_split(q, K), _split(k, K), operands, rule)
  s = jnp.where(seen, s, -jnp.inf)
  top = jnp.max(s, axis=-1, keepdims=True)
  top = jnp.where(jnp.isneginf(top), 0.0, top)
  p = jnp.exp(s - top)
  total = jnp.sum(p, axis=-1, keepdims=True)
  p = p.reshape(B * K, -1, p.shape[-1]).astype(v.dtype)
  out = _dot(p, _split(v, K), 2, 1)
  # Dividing here, not before the product, is T S divisions fewer.
  out /= jnp.where(total == 0, 1.0, total).reshape(B * K, -1, 1)
  lse = (top + jnp.log(total)).reshape(B, N, T)
  return _join(out, B, T).astype(q.dtype), lse


def backward(operands, rule, saved, dout):
  """Returns the gradients of q, k, v and of a bias; see the package."""
  q, k, v, *_ = operands
  lse, delta = saved
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  q, k, v, dout = (_split(x, K) for x in (q, k, v, dout))
  s, seen, slope = _scores(q, k, operands, rule)
  p = jnp.where(seen, jnp.exp(s - lse.reshape(B, K, -1, T, 1)), 0.0)
  dp = _dot(dout, v, 2, 2).reshape(s.shape)
  ds = p * (dp - delta.reshape(B, K, -1, T, 1))
  dbias = () if operands.row_bias is None else (
      ds.sum(4).reshape(B, N, T), -ds.sum(3).reshape(B, N, S))
  ds *= slope * rule.scale
  p = p.reshape(B * K, -1, S).astype(q.dtype)
  ds = ds.reshape(B * K, -1, S).astype(q.dtype)
  gradients = (_join(_dot(ds, k, 2, 1), B, T), _join(_dot(ds, q, 1, 1), B, S),
               _join(_dot(p, dout, 1, 1), B, S))
  return (*(x.astype(q.dtype) for x in gradients),
          *(jnp.swapaxes(x, 1, 2) for x in dbias))


def difference(row, column):
  """sum_a (row_a - column_a), of A arrays each: the bias of scores.

  Subtracting before adding is what keeps the digits of differences.
  """
  return functools.reduce(
      operator.add, (r - c for r, c in zip(row, column)))


def visible(row, column, q_ids, kv_ids, rule):
  """Who sees whom, [T,S], or [B,1,1,T,S] with segments; broadcasts.

  Args:
    row: [T] positions of the queries, counted from the first key.
    column: [S] positions of the keys.
    q_ids: [B,T] or None.
    kv_ids: [B,S] or None.
    rule: Rule.
  """
  row, column = row[:, None], column[None, :]
  seen = jnp.ones((row.shape[0], column.shape[1]), bool)
  if rule.causal:
    seen &= column <= row
  if rule.window:
    seen &= column > row - rule.window
  if q_ids is not None:
    same = q_ids[:, :, None] == kv_ids[:, None, :]
    seen = seen & same[:, None, None]
  return seen


def _scores(q, k, operands, rule):
  """Scores [B,K,G,T,S], the mask, and d(capped score) / d(score).

  Args:
    q: of the operands, as `_split` lays them out.
    k: likewise.
    operands: Operands.
    rule: Rule.
  """
  B, T = operands.q.shape[:2]
  S, K = operands.k.shape[1:3]
  softcap = rule.softcap
  s = _dot(q, k, 2, 2).reshape(B, K, -1, T, S) * rule.scale
  slope = 1.0
  if softcap:
    bounded = jnp.tanh(s / softcap)
    s, slope = softcap * bounded, 1 - bounded * bounded
  if operands.row_bias is not None:
    row, column = (
        jnp.transpose(x, (3, 0, 2, 1)).reshape(x.shape[3], B, K, -1, x.shape[1])
        for x in (operands.row_bias, operands.column_bias))
    s += difference(row[..., :, None], column[..., None, :])
  seen = visible(
      jnp.arange(T) + operands.q_offset, jnp.arange(S), operands.q_ids,
      operands.kv_ids, rule)
  return s, seen, slope


def _split(x, K):
  """[B,T,N,X] -> [B K, G T, X]: batched matmuls of two-dimensional blocks."""
  x = jnp.swapaxes(x, 1, 2)
  return x.reshape(x.shape[0] * K, -1, x.shape[-1])


def _join(x, B, T):
  """[B K, G T, X] -> [B,T,N,X]."""
  return jnp.swapaxes(x.reshape(B, -1, T, x.shape[-1]), 1, 2)


def _dot(a, b, a_axis, b_axis):
  return jax.lax.dot_general(
      a, b, (((a_axis,), (b_axis,)), ((0,), (0,))),
      preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
