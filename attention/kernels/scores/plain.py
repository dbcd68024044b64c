"""Weighted attention that holds all scores at once, differentiated by jax."""

import jax
import jax.numpy as jnp

from attention.kernels.flash.plain import difference, visible
from attention.kernels.scores.fire import bias


def check(operands, rule):
  """Everything is supported."""
  del operands, rule


def forward(operands, rule):
  """See `attention.kernels.scores`."""
  return attend(operands, rule), None


def backward(operands, rule, saved, cotangents):
  """See `attention.kernels.scores`."""
  del saved
  return gradients(attend, operands, rule, cotangents)


def gradients(attend, operands, rule, cotangents):
  """The Operands' gradients through a function like `attend`."""
  floats = dict(q=operands.q, k=operands.k, v=operands.v,
                learned=operands.learned, fire=operands.fire,
                row_bias=operands.row_bias, column_bias=operands.column_bias)
  _, pull = jax.vjp(
      lambda floats: attend(operands._replace(**floats), rule), floats)
  return operands._replace(
      **pull(cotangents)[0], q_ids=None, kv_ids=None, q_offset=None,
      positions=None)


def attend(operands, rule):
  """[B,T,N,V]."""
  q, k, v, q_ids, kv_ids, q_offset, positions, learned, fire, *_ = operands
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  f32 = lambda x: x.astype(jnp.float32)
  grouped = f32(q).reshape(B, T, K, N // K, H)
  s = rule.scale * jnp.einsum('BTKGH,BSKH->BKGTS', grouped, f32(k))
  s = s.reshape(B, N, T, S)
  if rule.softcap:
    s = rule.softcap * jnp.tanh(s / rule.softcap)
  row, column = jnp.arange(T) + q_offset, jnp.arange(S)
  if rule.fire is not None:
    s += bias(rule.fire, fire, row[:, None] - column, positions)
  if operands.row_bias is not None:
    rows, columns = (jnp.transpose(x, (3, 0, 2, 1)) for x in operands[-2:])
    s += difference(rows[..., :, None], columns[..., None, :])
  seen = visible(row, column, q_ids, kv_ids, rule)
  if q_ids is not None:
    seen = seen[:, 0]  # [B,1,T,S]
  w = rule.weigh(jnp.where(seen, s, 0.0), seen, *learned)
  if rule.by_length:
    w /= jnp.maximum(seen.sum(-1, keepdims=True), 1)
  w = w.reshape(B, K, N // K, T, S)
  y = jnp.einsum('BKGTS,BSKV->BTKGV', w, f32(v))
  return y.reshape(B, T, N, -1).astype(v.dtype)
