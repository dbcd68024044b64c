"""Outputs and their log-sum-exp: a block of queries walks over its keys."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.flash.gpu import blocks
from attention.kernels.mosaic_gpu import PER_ROW, ROWS, by_row, optional

# Below every score, and finite: where nothing was seen yet, -inf less this is
# still -inf, and its exponential 0.
_FLOOR = -3e38


def kernel(gmem, smem, plan):
  batch, head, tile, span, warpgroup = blocks.place(
      gmem.spans, largest_first=True)
  kv_head = lax.div(head, jnp.int32(plan.G))

  def sources(block, head):
    del head
    keys = pl.ds(block * plan.block, plan.block)
    return [
        (smem.k_free, smem.k_ready,
         [(gmem.k.at[batch, keys, kv_head], smem.k),
          *optional(gmem.ring_ids, (batch, keys), smem.ring_ids)]),
        (smem.v_free, smem.v_ready,
         [(gmem.v.at[batch, keys, kv_head], smem.v)])]

  def compute():
    row = tile * blocks.HEIGHT + warpgroup * ROWS
    rows = pl.ds(row, ROWS)
    blocks.load_rows(
        [(gmem.q.at[batch, rows, head], smem.q),
         *optional(gmem.own_ids, (batch, rows), smem.own_ids)],
        smem.own_ready, warpgroup)
    sums, top, total = _attend(
        smem, plan, span, warpgroup, row + span.offset, gmem.v.shape[-1])
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    smem.lse[warpgroup] = jnp.where(
        seen, top / mosaic_gpu.LOG2E + jnp.log(safe), -jnp.inf)
    staged = (smem.q if smem.out is None else smem.out).at[warpgroup]
    first = 0
    for part in sums:
      width = part.shape[1]
      staged[:, pl.ds(first, width)] = (
          part * by_row(1 / safe, part.shape)).astype(staged.dtype)
      first += width
    mosaic_gpu.copy_out([
        (staged, gmem.out.at[batch, rows, head]),
        (smem.lse.at[warpgroup], gmem.lse.at[batch, head, rows])])
    mosaic_gpu.wait_written()

  copy = functools.partial(blocks.feed, plan, span, 1, sources)
  blocks.divide_work(warpgroup, copy, compute, registers=(40, 232))


def _attend(smem, plan, span, warpgroup, position, V):
  """Unnormalised outputs in parts [64, <= 128], row maxima, row sums."""
  part = 128 if V <= 128 else 64
  starts = range(0, V, part)

  def take_turns():
    # One warpgroup's products run during the other one's exponentials.
    mosaic_gpu.arrive(smem.turn)
    mosaic_gpu.wait(smem.turn)

  def scores(slot, acc):
    plgpu.wgmma(
        acc, smem.q.at[warpgroup], mosaic_gpu.transposed(smem.k.at[slot]))
    take_turns()
    return acc[...]

  def visit(step, block, head, masked, carry):
    del head
    sums, top, total = carry
    slot = lax.rem(step, plan.stages)
    mosaic_gpu.wait(smem.k_ready.at[slot])
    s = pl.run_scoped(
        functools.partial(scores, slot), plgpu.ACC((ROWS, plan.block)))
    s, unit, _ = blocks.cap(plan, s)
    if masked:
      seen = blocks.visible(plan, position, block * plan.block, s.shape,
                            blocks.load_ids(smem, plan, warpgroup, slot))
      s = jnp.where(seen, s, -jnp.inf)
    blocks.release(smem.k_free, slot, was_read=masked and plan.segments)
    new_top = jnp.maximum(top, jnp.max(s, axis=1) * unit)
    p = jnp.exp2(s * unit - by_row(new_top, s.shape))
    kept = jnp.exp2(top - new_top)
    total = total * kept + jnp.sum(p, axis=1)
    p = p.astype(smem.v.dtype)
    mosaic_gpu.wait(smem.v_ready.at[slot])
    take_turns()
    # Products into fresh accumulators: the addition rides on the rescaling.
    sums = tuple(
        old * by_row(kept, old.shape) + mosaic_gpu.product(
            p, smem.v.at[slot, :, pl.ds(start, old.shape[1])])
        for start, old in zip(starts, sums))
    blocks.release(smem.v_free, slot, was_read=False)
    return sums, new_top, total

  sums = tuple(
      mosaic_gpu.filled((ROWS, min(part, V - start)), 0) for start in starts)
  pl.when(warpgroup == 1)(take_turns)
  top = mosaic_gpu.filled((ROWS,), _FLOOR, PER_ROW)
  total = mosaic_gpu.filled((ROWS,), 0, PER_ROW)
  carry = blocks.walk(span, 1, visit, (sums, top, total))
  pl.when(warpgroup == 0)(take_turns)
  return carry
