"""The backward TPU kernel of flash attention: all gradients of a visit."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import mosaic_tpu
from attention.kernels.flash.tpu import chunk
from attention.kernels.mosaic_tpu import NN, NT, dot


def kernel(ref, plan):
  """One visit; the last one of a query block or of a key head writes."""
  visit = chunk.visit(ref, plan)
  step, steps = pl.program_id(3), pl.num_programs(3)
  head, heads = pl.program_id(2), pl.num_programs(2)

  @pl.when((head == 0) & (step == 0))
  def _():
    def clear(keys):
      for acc in (ref.dk_acc, ref.dv_acc):
        acc[keys] = jnp.zeros((keys.size, acc.shape[1]), jnp.float32)
    _each_block(ref, plan, clear)

  @pl.when(visit.first)
  def _():
    ref.dq_acc[...] = jnp.zeros_like(ref.dq_acc)

  chunk.each_kind(plan, visit, functools.partial(_block, ref, plan, visit))

  @pl.when(visit.last)
  def _():
    ref.dq[...] = (ref.dq_acc[...] * plan.rule.scale).T.astype(ref.dq.dtype)

  @pl.when((head == heads - 1) & (step == steps - 1))
  def _():
    def write(keys):
      ref.dk[keys] = (ref.dk_acc[keys] * plan.rule.scale).astype(ref.dk.dtype)
      ref.dv[keys] = ref.dv_acc[keys].astype(ref.dv.dtype)
    _each_block(ref, plan, write)


def _each_block(ref, plan, body):
  """Calls body(keys) for all keys, a block at a time."""
  size = plan.blocks.k

  def at(n, _):
    body(pl.ds(pl.multiple_of(n * size, size), size))

  jax.lax.fori_loop(0, ref.dk_acc.shape[0] // size, at, None)


def _block(ref, plan, visit, kind):
  """Adds one block's share to dq_acc, dk_acc and dv_acc."""
  transposed = ref.k[...].T

  def start(tile):
    queries, keys, _ = tile
    return (*chunk.scores(plan, ref.k[keys], ref.q[queries]),
            dot(ref.v[keys], ref.dout[queries], NT))

  def finish(tile, s, slope, dp):
    queries, keys, masked = tile
    p = jnp.exp2(s - ref.lse_delta[:1, queries])
    if masked:
      p = jnp.where(chunk.mask(ref, plan, visit, tile), p, 0.0)
    ds = p * (dp - ref.lse_delta[1:, queries])
    if slope is not None:
      ds *= slope
    p, ds = p.astype(ref.v.dtype), ds.astype(ref.k.dtype)
    at = pl.ds(pl.multiple_of(visit.j, plan.blocks.k) + keys.start,
               keys.stop - keys.start)
    ref.dv_acc[at] += dot(p, ref.dout[queries], NN)
    ref.dk_acc[at] += dot(ds, ref.q[queries], NN)
    ref.dq_acc[:, queries] += dot(transposed[:, keys], ds, NN)

  mosaic_tpu.pipeline(chunk.tiles(plan, kind), [start, finish],
                      distance=plan.blocks.ahead + 1)
