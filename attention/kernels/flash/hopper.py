"""What the Mosaic GPU attention kernels share: blocks, rings, tiles, masks."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels.flash import Rule

LOG2E = math.log2(math.e)
ROWS = 64  # of a warpgroup: the M of wgmma
WARPGROUPS = 2  # that compute; a third one copies
HEIGHT = ROWS * WARPGROUPS  # rows of a thread block
TILE = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = TILE.reduce(1), TILE.reduce(0)


class Plan(NamedTuple):
  """What a kernel is compiled for, beside the shapes of its operands."""
  rule: Rule
  segments: bool
  S: int
  G: int
  block: int  # columns of a score tile: keys, or queries in _dkv_kernel
  stages: int  # buffers of the ring


class Span(NamedTuple):
  """A thread block's blocks of columns: the visible, among them the full."""
  start: jax.Array
  full_start: jax.Array
  full_stop: jax.Array
  stop: jax.Array
  offset: jax.Array


def query_spans(plan, operands):
  """Padded ids and spans of keys for the kernels that walk over keys."""
  ids = pad_ids(operands, HEIGHT, plan.block)
  some, every = block_masks(plan, operands, HEIGHT, plan.block, ids)
  # Past the end there are keys of zeros.
  whole = jnp.arange(1, every.shape[-1] + 1) * plan.block <= plan.S
  return ids, make_spans(some, every & whole, operands.q_offset)


def pad_length(x):
  """[B,T,..] to the next T that 8 divides: TMA cuts arrays in tiles of 8 rows.

  Longer ends need no padding, since copies run over them.
  """
  missing = -x.shape[1] % 8
  if not missing:
    return x
  return jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)])


def pad_ids(operands, rows, columns):
  """Whole blocks of ids. The last one repeats: no block gains a segment."""
  if operands.q_ids is None:
    return ()
  return tuple(
      jnp.pad(x.astype(jnp.int32), ((0, 0), (0, -x.shape[1] % block)), 'edge')
      for x, block in ((operands.q_ids, rows), (operands.kv_ids, columns)))


def block_masks(plan, operands, rows, columns, ids):
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
  if ids:
    q, kv = (x.reshape(x.shape[0], -1, block)
             for x, block in zip(ids, (rows, columns)))
    low, high = jnp.min(q, -1)[..., None], jnp.max(q, -1)[..., None]
    low_key, high_key = jnp.min(kv, -1)[:, None], jnp.max(kv, -1)[:, None]
    some &= (low_key <= high) & (high_key >= low)
    every &= (low == high) & (low_key == high_key) & (low == low_key)
  return some, every & some


def make_spans(some, every, q_offset):
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


def read_span(spans, batch, tile):
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


def launch(body, plan, grid, outputs, scratch, *, name):
  """Compiles body(plan, *operands, *outputs, **scratch); the result is called.

  The grid is (batch, heads, tiles of 128 rows), tiles varying fastest, so that
  the thread blocks that run together share the other operands in the L2 cache.
  """
  return plgpu.kernel(
      functools.partial(body, plan), out_type=outputs, scratch_types=scratch,
      grid=grid, grid_names=('b', 'n', 'tile'), kernel_name=f'flash_{name}',
      num_threads=WARPGROUPS + 1, thread_name='warpgroup',
      compiler_params=plgpu.CompilerParams(approx_math=True))


def coordinates():
  return [lax.axis_index(x) for x in ('b', 'n', 'tile', 'warpgroup')]


def query_tile(plan, spans):
  """What a thread block of queries works on, in a kernel that walks over keys.

  Returns its span, batch, head, key head, tile and warpgroup.
  """
  batch, head, tile, warpgroup = coordinates()
  # The last queries see the most keys under a causal mask: they start first.
  tile = spans.shape[1] - 1 - tile
  kv_head = lax.div(head, jnp.int32(plan.G))
  return read_span(spans, batch, tile), batch, head, kv_head, tile, warpgroup


def divide_work(warpgroup, copy, compute, registers):
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


def barrier(arrivals, count):
  return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def own_tile(width, dtype):
  """Shared memory for the rows of each warpgroup: [2, 64, width]."""
  return _tiled((WARPGROUPS, ROWS, width), dtype)


def ring_tile(plan, width, dtype):
  """Shared memory that is filled while it is read: [stages, block, width]."""
  return _tiled((plan.stages, plan.block, width), dtype)


def _tiled(shape, dtype):
  # The layout that TMA writes and wgmma reads without bank conflicts.
  lanes = math.gcd(shape[-1], 64)
  return plgpu.SMEM(shape, dtype, transforms=(
      plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes)))


def own_vector(dtype):
  return plgpu.SMEM((WARPGROUPS, ROWS), dtype)


def ring_vector(plan, dtype):
  return plgpu.SMEM((plan.stages, plan.block), dtype)


def id_buffers(plan):
  """Shared memory for the segment ids of rows and columns, if there are any."""
  if not plan.segments:
    return {}
  return dict(own_ids=own_vector(jnp.int32),
              ring_ids=ring_vector(plan, jnp.int32))


def load_ids(plan, smem, warpgroup, slot):
  if not plan.segments:
    return None
  return (plgpu.layout_cast(smem.own_ids[warpgroup], PER_ROW),
          plgpu.layout_cast(smem.ring_ids[slot], PER_COLUMN))


def feed(plan, span, G, sources):
  """The copying warpgroup: keeps the rings of buffers full."""
  def visit(step, block, head, masked, carry):
    del masked
    slot = lax.rem(step, plan.stages)
    for free, ready, copies in sources(block, head):
      pl.when(step >= plan.stages)(
          functools.partial(plgpu.barrier_wait, free.at[slot]))
      for source, buffer in copies:
        plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])
    return carry

  walk(span, G, visit, ())


def release(free, slot, was_read):
  """Gives a slot of a ring back to feed.

  was_read: registers were loaded from it. wgmma and TMA are ordered among
  themselves; loads are ordered before the next copy by a fence.
  """
  if was_read:
    plgpu.commit_smem()
  plgpu.barrier_arrive(free.at[slot])


def fetch(copies, slot, barrier):
  """A computing warpgroup waits for what it alone reads."""
  for source, buffer in copies:
    plgpu.copy_gmem_to_smem(source, buffer.at[slot], barrier.at[slot])
  plgpu.barrier_wait(barrier.at[slot])


def store(copies):
  """Writes buffers of shared memory out."""
  plgpu.commit_smem()
  for buffer, target in copies:
    plgpu.copy_smem_to_gmem(buffer, target)
  plgpu.wait_smem_to_gmem(0)


def products(*pairs):
  """a b^T of each pair of tiles in shared memory, queued together."""
  def multiply(*sums):
    for acc, (a, b) in zip(sums, pairs):
      plgpu.wgmma(acc, a, b.transpose((1, 0)))
    return [acc[...] for acc in sums]

  return pl.run_scoped(
      multiply, *(plgpu.ACC((ROWS, b.shape[0])) for _, b in pairs))


def filled(shape, value, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def by_row(x, shape):
  """A value per row, broadcast over a tile."""
  return lax.broadcast_in_dim(x, shape, [0])


def by_column(buffer, slot, shape):
  """A value per column, from shared memory, broadcast over a tile."""
  x = plgpu.layout_cast(buffer[slot], PER_COLUMN)
  return lax.broadcast_in_dim(x, shape, [1])


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
  return by_row(ids[0], shape) == lax.broadcast_in_dim(ids[1], shape, [1])
