"""The gradients: dq, walking over keys, dk and dv, walking over queries."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.flash.gpu import blocks
from attention.kernels.mosaic_gpu import (
    PER_ROW,
    ROWS,
    by_column,
    by_row,
    optional,
    transposed,
)


def dq_kernel(gmem, smem, plan):
  batch, head, tile, span, warpgroup = blocks.place(
      gmem.spans, largest_first=True)
  kv_head = lax.div(head, jnp.int32(plan.G))

  def sources(block, head):
    del head
    keys = pl.ds(block * plan.block, plan.block)
    return [(smem.free, smem.ready,
             [(gmem.k.at[batch, keys, kv_head], smem.k),
              (gmem.v.at[batch, keys, kv_head], smem.v),
              *optional(gmem.ring_ids, (batch, keys), smem.ring_ids)])]

  def compute():
    row = tile * blocks.HEIGHT + warpgroup * ROWS
    rows = pl.ds(row, ROWS)
    blocks.load_rows(
        [(gmem.q.at[batch, rows, head], smem.q),
         (gmem.dout.at[batch, rows, head], smem.dout),
         (gmem.lse.at[batch, head, rows], smem.lse),
         (gmem.delta.at[batch, head, rows], smem.delta),
         *optional(gmem.own_ids, (batch, rows), smem.own_ids)],
        smem.own_ready, warpgroup)
    own_lse = mosaic_gpu.load(smem.lse.at[warpgroup], PER_ROW)
    own_delta = mosaic_gpu.load(smem.delta.at[warpgroup], PER_ROW)

    def visit(total, step, block, head, masked, carry):
      del head
      slot = lax.rem(step, plan.stages)
      mosaic_gpu.wait(smem.ready.at[slot])
      s, dp = mosaic_gpu.products(
          (smem.q.at[warpgroup], transposed(smem.k.at[slot])),
          (smem.dout.at[warpgroup], transposed(smem.v.at[slot])))
      s, unit, slope = blocks.cap(plan, s)
      p = jnp.exp2(s * unit - by_row(own_lse, s.shape))
      if masked:
        seen = blocks.visible(
            plan, row + span.offset, block * plan.block, s.shape,
            blocks.load_ids(smem, plan, warpgroup, slot))
        p = jnp.where(seen, p, 0.0)
      ds = p * (dp - by_row(own_delta, s.shape))
      ds = ds if slope is None else ds * slope
      plgpu.wgmma(total, ds.astype(smem.q.dtype), smem.k.at[slot])
      plgpu.wgmma_wait(0)
      blocks.release(smem.free, slot, was_read=masked and plan.segments)
      return carry

    def accumulate(total):
      blocks.walk(span, 1, functools.partial(visit, total), ())
      return total[...]

    dq = pl.run_scoped(accumulate, plgpu.ACC(smem.q.shape[1:]))
    smem.q[warpgroup] = (dq * plan.rule.scale).astype(smem.q.dtype)
    mosaic_gpu.copy_out(
        [(smem.q.at[warpgroup], gmem.dq.at[batch, rows, head])])
    mosaic_gpu.wait_written()

  copy = functools.partial(blocks.feed, plan, span, 1, sources)
  blocks.divide_work(warpgroup, copy, compute, registers=(24, 240))


def dkv_kernel(gmem, smem, plan):
  """dk, dv or both, whichever are outputs, summed over a group of heads."""
  batch, kv_head, tile, span, warpgroup = blocks.place(gmem.spans)

  def sources(block, head):
    queries = pl.ds(block * plan.block, plan.block)
    head += kv_head * plan.G
    return [(smem.free, smem.ready,
             [(gmem.q.at[batch, queries, head], smem.q),
              (gmem.dout.at[batch, queries, head], smem.dout),
              (gmem.lse.at[batch, head, queries], smem.lse),
              (gmem.delta.at[batch, head, queries], smem.delta),
              (gmem.positions.at[queries], smem.positions),
              *optional(gmem.ring_ids, (batch, queries), smem.ring_ids)])]

  def compute():
    row = tile * blocks.HEIGHT + warpgroup * ROWS
    rows = pl.ds(row, ROWS)
    blocks.load_rows(
        [(gmem.k.at[batch, rows, kv_head], smem.k),
         (gmem.v.at[batch, rows, kv_head], smem.v),
         *optional(gmem.own_ids, (batch, rows), smem.own_ids)],
        smem.own_ready, warpgroup)

    def accumulate(dk=None, dv=None):
      visit = functools.partial(
          _visit_queries, smem, plan, warpgroup, row, dk, dv)
      blocks.walk(span, plan.G, visit, ())
      return [None if total is None else total[...] for total in (dk, dv)]

    sums = {}
    if gmem.dk is not None:
      sums['dk'] = plgpu.ACC(smem.k.shape[1:])
    if gmem.dv is not None:
      sums['dv'] = plgpu.ACC(smem.v.shape[1:])
    dk, dv = pl.run_scoped(accumulate, **sums)
    # A gradient leaves in the buffer that its operand came in.
    copies = []
    if dk is not None:
      smem.k[warpgroup] = (dk * plan.rule.scale).astype(smem.k.dtype)
      copies.append((smem.k.at[warpgroup], gmem.dk.at[batch, rows, kv_head]))
    if dv is not None:
      smem.v[warpgroup] = dv.astype(smem.v.dtype)
      copies.append((smem.v.at[warpgroup], gmem.dv.at[batch, rows, kv_head]))
    mosaic_gpu.copy_out(copies)
    mosaic_gpu.wait_written()

  copy = functools.partial(blocks.feed, plan, span, plan.G, sources)
  blocks.divide_work(warpgroup, copy, compute, registers=(24, 240))


def _visit_queries(smem, plan, warpgroup, row, dk, dv, step, block, head,
                   masked, carry):
  """Adds a block of queries to those of the sums dk and dv that there are."""
  # Which block it is comes with it, as positions: counters that are live in
  # the loop would not fit in its registers.
  del block, head
  slot = lax.rem(step, plan.stages)
  mosaic_gpu.wait(smem.ready.at[slot])
  # Transposed: keys are rows, so that p and ds are left operands. With 128
  # registers in the sums, s must be gone before dp comes.
  s = mosaic_gpu.product(smem.k.at[warpgroup], transposed(smem.q.at[slot]))
  s, unit, slope = blocks.cap(plan, s)
  p = jnp.exp2(s * unit - by_column(smem.lse[slot], s.shape))
  if masked and (plan.rule.causal or plan.segments):
    seen = blocks.visible_transposed(
        plan, row, by_column(smem.positions[slot], s.shape),
        blocks.load_ids(smem, plan, warpgroup, slot))
    p = jnp.where(seen, p, 0.0)
  rounded = p.astype(smem.q.dtype)
  # Here, not below: the slope would be kept across a product.
  p = p if slope is None else p * slope
  if dv is not None:
    plgpu.wgmma(dv, rounded, smem.dout.at[slot])
  if dk is not None:
    dp = mosaic_gpu.product(
        smem.v.at[warpgroup], transposed(smem.dout.at[slot]))
    ds = p * (dp - by_column(smem.delta[slot], s.shape))
    plgpu.wgmma(dk, ds.astype(smem.q.dtype), smem.q.at[slot])
  plgpu.wgmma_wait(0)
  blocks.release(smem.free, slot, was_read=True)
  return carry
