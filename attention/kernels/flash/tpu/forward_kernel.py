"""The forward TPU kernel of flash attention."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from attention.kernels import mosaic_tpu
from attention.kernels.flash.tpu import chunk
from attention.kernels.mosaic_tpu import LOG2E, NN, dot

_LOWEST = float(np.finfo(np.float32).min)

# Rows of ones under v^T, whose products with p are its sums: a packed tile.
_ONES = 16


def kernel(ref, plan):
  """One visit; the last one of a query block writes its out and lse."""
  visit = chunk.visit(ref, plan)

  @pl.when(visit.first)
  def _():
    known = _known_maximum(plan)
    ref.m[...] = jnp.full_like(ref.m, _LOWEST if known is None else known)
    ref.l[...] = jnp.zeros_like(ref.l)
    ref.out_acc[...] = jnp.zeros_like(ref.out_acc)

  chunk.each_kind(plan, visit, functools.partial(_block, ref, plan, visit))

  @pl.when(visit.last)
  def _():
    sums = ref.l[...]
    empty = sums == 0
    sums = jnp.where(empty, 1.0, sums)
    ref.out[...] = (ref.out_acc[...] / sums).T.astype(ref.out.dtype)
    ref.lse[...] = jnp.where(
        empty, -jnp.inf, ref.m[...] / LOG2E + jnp.log(sums))


def _known_maximum(plan):
  """A maximum in log 2 that need not be looked for, or None.

  Under a softcap of up to 50, every exponential against this one is between
  2^-116 and 2^30, and so are float32's sums of more keys than there can be.
  """
  bound = plan.rule.softcap * LOG2E
  return bound - 30 if 0 < bound <= 73 else None


def _block(ref, plan, visit, kind):
  """Takes one block of keys into m, l and out_acc."""
  transposed = ref.v[...].T
  if plan.blocks.mxu_sums:
    ones = jnp.ones((_ONES, transposed.shape[1]), transposed.dtype)
    transposed = jnp.concatenate([transposed, ones])

  def start(tile):
    s, _ = chunk.scores(plan, ref.k[tile.keys], ref.q[tile.queries])
    return (s,)

  def finish(tile, s):
    queries, keys, masked = tile
    if masked:
      seen = chunk.mask(ref, plan, visit, tile)
      s = jnp.where(seen, s, _LOWEST)
    m = ref.m[:, queries]
    new_m = m
    if _known_maximum(plan) is None:
      new_m = jnp.maximum(m, jnp.max(s, axis=0, keepdims=True))
    p = jnp.exp2(s - new_m)
    if masked:
      p = jnp.where(seen, p, 0.0)
    product = dot(transposed[:, keys], p.astype(ref.v.dtype), NN)
    width = ref.out_acc.shape[0]
    if plan.blocks.mxu_sums:
      sums = product[width:width + 1]
    else:
      sums = jnp.sum(p, axis=0, keepdims=True)
    if new_m is not m:
      kept = jnp.exp2(m - new_m)
      ref.m[:, queries] = new_m
      ref.l[:, queries] *= kept
      ref.out_acc[:, queries] *= kept
    ref.l[:, queries] += sums
    ref.out_acc[:, queries] += product[:width]

  mosaic_tpu.pipeline(chunk.tiles(plan, kind), [start, finish],
                      distance=plan.blocks.ahead + 1)
