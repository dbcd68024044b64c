"""Decays between the steps of a chunk of `delta.xla`, and what they weigh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention.kernels.delta.products import pair

__all__ = ['Decays', 'between', 'decayed_scores']

NEAR = 4  # Steps of a small block, a power of two.
# Within a small block a decay below this counts as this: relative to what it
# weighs, float32 resolves 6e-8.
FLOOR = 1e-15


class Decays(NamedTuple):
  """Those of chunks of T steps, [X,n,...,H], or 1 in place of H.

  Attributes:
    before: from the state before the chunk to each step, [X,n,T,H].
    after: from each step to the state after the chunk, likewise.
    near: F [X,n,blocks,NEAR,H], such that F_t / F_s is the decay from step s to
      step t of a small block.
    levels: for blocks of 2 NEAR, 4 NEAR ... T steps, those from the middle to
      the steps of second halves, and from the steps of first halves to the
      middle, [X,n,blocks,half,H].
  """
  before: jax.Array
  after: jax.Array
  near: jax.Array
  levels: tuple


def between(decay, document):
  """The Decays of each step's [X,n,T,H or 1], T a power of two.

  Those between different documents may be anything from 0 to 1. Others do not
  depend, not even in how they are rounded, on what there is in a document that
  is not theirs.

  Args:
    decay: as above, in [0, 1].
    document: int [X or 1,n,T,1].
  """
  before, after, levels = _spans(decay, document, decay.shape[2])
  return Decays(before, after, _near(decay, document), levels)


def decayed_scores(packed, queries, k, decays):
  """Products of queries [X,n,G,T,H] and keys [X,n,S,H] decayed until them.

  A product for each size of blocks. Steps of a small one meet as `near` says.
  Of larger ones a query in the second half and a key in the first meet in the
  middle, both decayed until there, and halves are made of halves in the same
  way. What is above the diagonal is of no use.
  """
  X, n, G, _, H = queries.shape

  def meet(queries, k):  # [X,n,G,blocks,T,H], [X,n,blocks,S,H].
    blocks, steps = k.shape[2:4]
    rows = queries.swapaxes(2, 3).reshape(X, n, blocks, G * steps, H)
    corner = pair(packed, rows, k)
    return corner.reshape(X, n, blocks, G, steps, steps).swapaxes(2, 3)

  cut = lambda x: x.reshape(*x.shape[:-2], *decays.near.shape[2:4], H)
  scores = meet(cut(queries) * decays.near[:, :, None], cut(k) / decays.near)
  for until, since in decays.levels:
    half = until.shape[3]
    (_, late), (early, _) = _halves(queries, half), _halves(k, half)
    corner = meet(late * until[:, :, None], early * since)
    blocks = scores.reshape(X, n, G, -1, 2, half, half)
    first, second = blocks[..., 0, :, :], blocks[..., 1, :, :]
    scores = jnp.concatenate([
        jnp.concatenate([first, jnp.zeros_like(first)], -1),
        jnp.concatenate([corner, second], -1)], -2)
  return scores[..., 0, :, :]


def _spans(decay, document, size):
  """Decays between the steps of blocks, as products of numbers in [0, 1].

  No sum of logarithms is taken, so that there are no differences of large ones.

  Args:
    decay, document: as in `between`.
    size: the steps of a block.

  Returns:
    Those from before a step's block, or document, to the step, those from it to
    the end of either, and the levels of `Decays`.
  """
  until, since, levels, half = decay, jnp.ones_like(decay), (), 1
  join = lambda *halves: jnp.stack(halves, axis=-3).reshape(decay.shape)
  while half < size:
    (a, b), (c, d) = _halves(until, half), _halves(since, half)
    first, second = _halves(document, half)
    if half >= NEAR:
      levels += ((b, c),)
    until = join(a, b * jnp.where(second == _last(first), _last(a), 1.0))
    since = join(c * jnp.where(first == _last(second), _last(b), 1.0), d)
    half *= 2
  return until, since, levels


def _near(decay, document):
  """`Decays.near`: 1 in the middle of a block.

  So it is more or less than that by two decays at most, which FLOOR keeps in
  float32's range.
  """
  size = min(NEAR, decay.shape[2])
  if size == 1:
    return jnp.ones_like(decay)[..., None, :]
  until, since, _ = _spans(jnp.maximum(decay, FLOOR), document, size // 2)
  _, late = _halves(until, size // 2)
  early, _ = _halves(since, size // 2)
  return jnp.concatenate([1 / early, late], axis=-2)


def _last(x):
  return x[..., -1:, :]


def _halves(x, size):
  """First and second halves [...,blocks,size,H] of the blocks of [...,T,H]."""
  x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
  return x[..., 0, :, :], x[..., 1, :, :]
