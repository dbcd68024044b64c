"""How the TPU kernels of chunked linear attention cut their work.

A program takes one state of one row of the batch, with some of its query heads,
through the sequence in blocks, in order. A block is a few chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.mosaic_tpu import LANES, round_up

# Rows of a table of segments.
_START, _STOP = 0, 1


class Blocks(NamedTuple):
  """What one grid step computes.

  Attributes:
    heads: query heads of a state.
    chunk: steps of a chunk, whole tiles of bfloat16.
    chunks: of a block.
  """
  heads: int
  chunk: int
  chunks: int

  @property
  def steps(self):
    return self.chunk * self.chunks


def sizes(T, group, *, widest, itemsize, chunk=128, rows=1024):
  """Returns the Blocks. Tests put a function with other sizes in its place.

  Args:
    T: steps.
    group: query heads of a state.
    widest: the wider of H and V.
    itemsize: bytes of an element of q, k and v.
    chunk: steps, where the products within a chunk and those with the state
      cost the least together for the usual widths.
    rows: of queries in a block, all heads together, of 128 bfloat16; fewer of
      wider ones. A body is unrolled over them: more hide more latency and save
      fewer states, fewer make a shorter program.
  """
  rows = rows * LANES // round_up(widest, LANES) * 2 // itemsize
  most = max(rows // chunk, 1)
  heads = max(n for n in range(1, most + 1) if group % n == 0)
  chunks = pl.cdiv(T, chunk)
  if chunks == 1:
    return Blocks(heads, round_up(T, 16), 1)
  return Blocks(heads, chunk, min(max(rows // (heads * chunk), 1), chunks))


def walk(plan, table, visit, *, backward=False):
  """Visits the segments of this program's block, in order.

  A segment is a run of steps of one document: of a block without a document's
  start, the whole, unless the sequence ends in it.

  Args:
    plan: Plan.
    table: ref of the block's part of `segments`, or None without documents.
    visit: called with the segment, (start, stop) or None for the whole block,
      and whether a document starts with it (None: certainly not).
    backward: whether blocks and segments are visited from the last.
  """
  steps = plan.blocks.steps
  block = pl.program_id(2)
  if backward:
    block = plan.n_blocks - 1 - block
  if table is None:
    tail = plan.T % steps
    if plan.n_blocks == 1 or not tail:
      visit((0, tail) if tail else None, None)
      return
    last = block == plan.n_blocks - 1
    pl.when(last)(lambda: visit((0, tail), None))
    pl.when(~last)(lambda: visit(None, None))
    return

  whole = table[_STOP, 0] == steps
  valid = jnp.minimum(plan.T - block * steps, steps)

  def forth(start):
    stop = table[_STOP, start]
    visit((start, stop), table[_START, start] >= 0)
    return stop

  def back(stop):
    first = table[_START, stop - 1]
    start = jnp.maximum(first, 0)
    visit((start, stop), first >= 0)
    return start

  if steps <= plan.T:
    pl.when(whole)(lambda: visit(None, table[_START, 0] >= 0))

  @pl.when(~whole)
  def _():
    if backward:
      jax.lax.while_loop(lambda stop: stop > 0, back, valid)
    else:
      jax.lax.while_loop(lambda start: start < valid, forth, jnp.int32(0))


def segments(starts, plan):
  """Where the segment of each step starts and stops, [B,blocks,2,steps].

  Counted from the block's first step; a start of -1 is in an earlier block.
  """
  T, steps, n_blocks = plan.T, plan.blocks.steps, plan.n_blocks
  starts = jnp.pad(starts, ((0, 0), (0, n_blocks * steps - T)))
  starts = starts.reshape(-1, n_blocks, steps)
  step = jnp.arange(steps, dtype=jnp.int32)
  first = jax.lax.cummax(jnp.where(starts, step, -1), axis=2)
  valid = jnp.minimum(T - jnp.arange(n_blocks) * steps, steps)
  valid = jnp.broadcast_to(valid[:, None], starts.shape).astype(jnp.int32)
  later = jnp.where(starts, step, valid)[..., 1:]
  later = jnp.concatenate([later, valid[..., :1]], axis=2)
  stop = jax.lax.cummin(later, axis=2, reverse=True)
  return jnp.stack([first, stop], axis=2)
