"""Blocks of scores: which are visited, how they come, what masks them.

Which blocks a thread block visits is decided before the kernel, in a few
integers (Span): blocks that the mask empties are never loaded, blocks that it
leaves whole take a loop without masks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.mosaic_gpu import (
    LOG2E,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    TILE,
    by_row,
)

WARPGROUPS = 2  # that compute; a third one copies
HEIGHT = ROWS * WARPGROUPS  # rows of a thread block


class Span(NamedTuple):
  """A thread block's blocks of columns: the visible, among them the full."""
  start: jax.Array
  full_start: jax.Array
  full_stop: jax.Array
  stop: jax.Array
  offset: jax.Array


def query_spans(plan, operands):
  """own_ids, ring_ids and spans, by name, of kernels that walk over keys."""
  ids = _pad_ids(operands, HEIGHT, plan.block)
  some, every = _block_masks(plan, operands, HEIGHT, plan.block, ids)
  # Past the end there are keys of zeros.
  whole = jnp.arange(1, every.shape[-1] + 1) * plan.block <= plan.S
  spans = _make_spans(some, every & whole, operands.q_offset)
  return dict(own_ids=ids[0], ring_ids=ids[1], spans=spans)


def key_spans(plan, operands):
  """own_ids, ring_ids and spans, by name, of those that walk over queries."""
  ids = _pad_ids(operands, plan.block, HEIGHT)
  masks = _block_masks(plan, operands, plan.block, HEIGHT, ids)
  some, every = (jnp.swapaxes(x, 1, 2) for x in masks)
  spans = _make_spans(some, every, operands.q_offset)
  return dict(own_ids=ids[1], ring_ids=ids[0], spans=spans)


def _pad_ids(operands, rows, columns):
  """Whole blocks of ids. The last one repeats: no block gains a segment."""
  if operands.q_ids is None:
    return None, None
  return tuple(
      mosaic_gpu.pad(x.astype(jnp.int32), axis=1, multiple=block, mode='edge')
      for x, block in ((operands.q_ids, rows), (operands.kv_ids, columns)))


def _block_masks(plan, operands, rows, columns, ids):
  """[B or 1, query blocks, key blocks]: something, everything is visible."""
  T, q_offset = operands.q.shape[1], operands.q_offset
  first = jnp.arange(pl.cdiv(T, rows))[:, None] * rows + q_offset
  last = jnp.minimum(first + rows, T + q_offset) - 1
  first_key = jnp.arange(pl.cdiv(plan.S, columns))[None] * columns
  last_key = jnp.minimum(first_key + columns, plan.S) - 1
  some = jnp.ones((1, first.shape[0], first_key.shape[1]), bool)
  every = some
  if plan.rule.causal:
    some &= first_key <= last
    every &= last_key <= first
  if plan.rule.window:
    some &= last_key > first - plan.rule.window
    every &= first_key > last - plan.rule.window
  if ids[0] is not None:
    q, kv = (x.reshape(x.shape[0], -1, block)
             for x, block in zip(ids, (rows, columns)))
    low, high = jnp.min(q, -1)[..., None], jnp.max(q, -1)[..., None]
    low_key, high_key = jnp.min(kv, -1)[:, None], jnp.max(kv, -1)[:, None]
    some &= (low_key <= high) & (high_key >= low)
    every &= (low == high) & (low_key == high_key) & (low == low_key)
  return some, every & some


def _make_spans(some, every, q_offset):
  """[..., rows, columns] masks -> int32 [..., rows, 5], the fields of Span.

  The columns between the first and the last visible one, and in them the first
  run of full ones: all there are, unless segments come and go.
  """
  n = some.shape[-1]
  index = jnp.arange(n)
  found = jnp.any(some, -1)
  start = jnp.where(found, jnp.argmax(some, -1), 0)
  stop = jnp.where(found, n - jnp.argmax(some[..., ::-1], -1), 0)
  found = jnp.any(every, -1)
  full_start = jnp.where(found, jnp.argmax(every, -1), stop)
  broken = ~every & (index > full_start[..., None])
  full_stop = jnp.where(jnp.any(broken, -1), jnp.argmax(broken, -1), n)
  full_stop = jnp.where(found, full_stop, stop)
  offset = jnp.broadcast_to(q_offset, start.shape)
  return jnp.stack(
      [start, full_start, full_stop, stop, offset], -1).astype(jnp.int32)


def _read_span(spans, batch, tile):
  if spans.shape[0] == 1:
    batch = 0
  return Span(*(spans[batch, tile, i] for i in range(5)))


def walk(span, G, visit, carry):
  """Folds visit(step, block, head, masked, carry) over the blocks of a span.

  First those that need a mask, then the full ones, for each of G heads.
  """
  leading = span.full_start - span.start
  n_full = span.full_stop - span.full_start
  n_masked = span.stop - span.start - n_full

  def masked(step, carry):
    head, i = _divmod(step, n_masked, G)
    block = span.start + i + jnp.where(i >= leading, n_full, 0)
    return visit(step, block, head, True, carry)

  def full(step, carry):
    head, i = _divmod(step - G * n_masked, n_full, G)
    return visit(step, span.full_start + i, head, False, carry)

  carry = lax.fori_loop(0, G * n_masked, masked, carry)
  return lax.fori_loop(G * n_masked, G * (n_masked + n_full), full, carry)


def _divmod(step, n, G):
  return (0, step) if G == 1 else (lax.div(step, n), lax.rem(step, n))


def place(spans, *, largest_first=False):
  """Batch, head, tile of rows, span and warpgroup."""
  batch, head, tile, warpgroup = map(
      lax.axis_index, ('b', 'n', 'tile', 'warpgroup'))
  # The last queries see the most keys under a causal mask: they start first.
  if largest_first:
    tile = spans.shape[1] - 1 - tile
  return batch, head, tile, _read_span(spans, batch, tile), warpgroup


def divide_work(warpgroup, copy, compute, *, registers):
  """One warpgroup copies and the others compute, with (few, many) registers."""
  few, many = registers

  @pl.when(warpgroup == WARPGROUPS)
  def _():
    plgpu.set_max_registers(few, action='decrease')
    copy()

  @pl.when(warpgroup < WARPGROUPS)
  def _():
    plgpu.set_max_registers(many, action='increase')
    compute()


def load_rows(copies, ready, warpgroup):
  """A computing warpgroup copies what it alone reads, and waits for it."""
  ready = ready.at[warpgroup]
  mosaic_gpu.copy_in(
      [(source, buffer.at[warpgroup]) for source, buffer in copies], ready)
  mosaic_gpu.wait(ready)


def load_ids(smem, plan, warpgroup, slot):
  """The segment ids of a block's rows and columns, if there are any."""
  if not plan.segments:
    return None
  return (mosaic_gpu.load(smem.own_ids.at[warpgroup], PER_ROW),
          mosaic_gpu.load(smem.ring_ids.at[slot], PER_COLUMN))


def feed(plan, span, G, sources):
  """The copying warpgroup: keeps the rings of buffers full.

  Args:
    plan: launch.Plan.
    span: Span.
    G: heads to walk over.
    sources: of (block, head): triples of the barriers of a ring, `free` and
      `ready`, and pairs of what is to be copied and the ring's buffers.
  """
  def visit(step, block, head, masked, carry):
    del masked
    slot = lax.rem(step, plan.stages)
    for free, ready, copies in sources(block, head):
      pl.when(step >= plan.stages)(
          functools.partial(mosaic_gpu.wait, free.at[slot]))
      mosaic_gpu.copy_in(
          [(source, buffer.at[slot]) for source, buffer in copies],
          ready.at[slot])
    return carry

  walk(span, G, visit, ())


def release(free, slot, was_read):
  """Gives a slot of a ring back to feed.

  was_read: registers were loaded from it. wgmma and TMA are ordered among
  themselves; loads are ordered before the next copy by a fence.
  """
  if was_read:
    plgpu.commit_smem()
  mosaic_gpu.arrive(free.at[slot])


def cap(plan, s):
  """Raw scores -> x and unit, score = x * unit in log 2, and d(score)/ds."""
  if not plan.rule.softcap:
    return s, plan.rule.scale * LOG2E, None
  # tanh from 2^x and rsqrt, one instruction each: the tanh instruction is good
  # to 11 bits only, and a division takes ten instructions.
  e = jnp.exp2(s * (2 * LOG2E * plan.rule.scale / plan.rule.softcap))
  root = lax.rsqrt(e + 1)
  x = 1 - 2 * root * root
  return x, plan.rule.softcap * LOG2E, 1 - x * x


def visible(plan, row, column, shape, ids):
  """The mask of a score tile of queries (rows) and keys (columns).

  row and column are where it starts, as positions counted from the first key.
  The row index varies little in a thread, the start of the columns in every
  step: so written, no tile of indices is kept in registers across the loop.
  """
  rows = _indices(row)
  columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE) + column
  seen = columns < plan.S
  if plan.rule.causal:
    seen &= columns <= by_row(rows, shape)
  if plan.rule.window:
    seen &= columns > by_row(rows - plan.rule.window, shape)
  return seen if ids is None else seen & _same(ids, shape)


def visible_transposed(plan, row, positions, ids):
  """Of keys (rows from row on) and queries, a tile of their positions."""
  shape, rows, masks = positions.shape, _indices(row), []
  if plan.rule.causal:
    masks.append(positions >= by_row(rows, shape))
  if plan.rule.window:
    masks.append(positions < by_row(rows + plan.rule.window, shape))
  if ids is not None:
    masks.append(_same(ids, shape))
  return functools.reduce(jnp.logical_and, masks)


def _indices(start):
  index = lax.broadcasted_iota(jnp.int32, (ROWS,), 0)
  return plgpu.layout_cast(index, PER_ROW) + start


def _same(ids, shape):
  return by_row(ids[0], shape) == mosaic_gpu.by_column(ids[1], shape)
