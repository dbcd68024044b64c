"""Weighted attention, some queries at a time.

Each block of queries has the whole rows of its scores, so that any weights will
do; its gradient computes them again. Some O(S) numbers a query are there at
once, never all scores.
"""

import functools

import jax
import jax.numpy as jnp

from attention.kernels.scores import plain
from attention.kernels.scores.plain import check

__all__ = ['backward', 'check', 'forward']

SCORES = 1 << 18  # of a head, about so many at once


def forward(operands, rule):
  """See `attention.kernels.scores`."""
  return _attend(operands, rule), None


def backward(operands, rule, saved, cotangents):
  """See `attention.kernels.scores`."""
  del saved
  return plain.gradients(_attend, operands, rule, cotangents)


def _attend(operands, rule):
  T, S = operands.q.shape[1], operands.k.shape[1]
  count = -(-T // max(SCORES // S, 1))
  if count == 1:
    return plain.attend(operands, rule)
  size = -(-T // count)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(part):
    first, q, q_ids, positions, row_bias = part
    return plain.attend(operands._replace(
        q=q, q_ids=q_ids, positions=positions, row_bias=row_bias,
        q_offset=operands.q_offset + first), rule)

  def split(x, mode='constant'):
    if x is None:
      return None
    fill = [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, fill, mode).reshape(-1, count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  # A bias of zero is a large one where the others are negative: the weights of
  # queries that only fill a block could then be infinite.
  y = jax.lax.map(block, (jnp.arange(count) * size, *map(split, (
      operands.q, operands.q_ids, operands.positions)),
                          split(operands.row_bias, 'edge')))
  y = jnp.moveaxis(y, 0, 1)
  return y.reshape(y.shape[0], count * size, *y.shape[3:])[:, :T]
