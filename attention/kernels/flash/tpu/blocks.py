"""How the TPU kernels of flash attention cut their work: blocks and visits."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from attention.kernels import dispatch
from attention.kernels.mosaic_tpu import LANES, round_up, vmem_bytes

# What the mask leaves of a block of [queries, keys]: nothing, a part of no
# known shape, the lower triangle (diagonal to diagonal), everything.
EMPTY, PARTIAL, TRIANGLE, FULL = range(4)

# A visit is one int32: key block, query block, kind, and whether it is the
# first and the last one of its query block.
_BITS = 13
MAX_BLOCKS = 1 << _BITS
_KIND, _FIRST, _LAST = 2 * _BITS, 2 * _BITS + 2, 2 * _BITS + 3

# A quarter of the scalar memory (1 MiB on every generation since v4).
MAX_VISITS = 1 << 16


class Blocks(NamedTuple):
  """What one grid step computes, and how it is cut for the scheduler.

  A step works on q queries and k keys in tiles of tile_q by tile_k. The scores
  of `ahead` tiles are computed before the first one is exponentiated. With
  mxu_sums, the matrix unit adds up the exponentials. Where documents are
  packed, a block is no longer than `packed`.
  """
  q: int
  k: int
  tile_q: int
  tile_k: int
  ahead: int
  mxu_sums: bool = False
  packed: int = 512


# The first row that fits is taken: generations (none is any), least width of
# the wider of H and V, least itemsize, then forward and backward blocks.
#
# The last three rows were chosen by benchmarks/tpu_cycles.py. A body begins
# with products alone and ends with exponentials alone, some 200 bundles in
# which other units wait, and a step takes 100 to 200 scalar cycles: 1,024 by
# 1,024 scores pay for both a quarter as often as 512 by 512, and tiles keep the
# diagonal thin. A body is unrolled: larger blocks would make programs of tens
# of thousands of bundles. A v4 has no VMEM for the spills, scores that wait for
# the vector unit. Four of the five matmuls of the backward pass have queries as
# their weights, which tiles of many keys load seldom. The matrix units of v6e
# and 7x are 256 wide, twice those of the others, and want tiles that fill them;
# then forward waits for the vector unit, and sums by the matrix unit save a
# tenth of the time, where elsewhere they would cost 3%. A forward block of 512
# is so inefficient there that packed documents, most of whose blocks are cut by
# the mask, want 1,024 as well.
#
# The rows above were not: wide heads and float32 (six passes of the matrix unit
# for each product) get smaller blocks to keep programs short and fit in VMEM.
_TABLE = (
    ((), 129, 4, Blocks(256, 256, 128, 128, 2), Blocks(128, 128, 128, 128, 1)),
    ((), 0, 4, Blocks(256, 256, 128, 128, 2), Blocks(256, 256, 128, 256, 1)),
    ((), 129, 2, Blocks(512, 512, 256, 128, 4), Blocks(256, 256, 128, 256, 2)),
    (('v6e', '7x'), 0, 2,
     Blocks(1024, 1024, 256, 256, 5, mxu_sums=True, packed=1024),
     Blocks(1024, 1024, 256, 512, 1)),
    (('v5e', 'v5p'), 0, 2,
     Blocks(1024, 1024, 256, 128, 4), Blocks(1024, 1024, 128, 512, 2)),
    ((), 0, 2, Blocks(512, 512, 256, 128, 4), Blocks(512, 512, 128, 512, 2)),
)

# Least bound that a window sets on a block.
_SHORTEST = 256


def sizes(T, S, *, widest, itemsize, backward, window=0, packed=False):
  """Returns the Blocks for T queries and S keys of a head.

  Tests put a function with other sizes in its place.

  Args:
    T: queries. A short sequence gets blocks of its own size, rounded up to
      the 128 lanes on which queries and keys lie.
    S: keys.
    widest: the wider of H and V.
    itemsize: bytes of an element of q, k and v.
    backward: whether for the backward kernel.
    window: as for flash_attention.
    packed: whether there are segments.
  """
  chip = dispatch.target().chip
  blocks = next(
      blocks[backward] for chips, width, size, *blocks in _TABLE
      if widest >= width and itemsize >= size and (not chips or chip in chips))
  # Blocks that the mask cuts are computed whole: none is longer than a window,
  # or than documents often are.
  most = blocks.packed if packed else max(T, S)
  if window:
    most = min(most, max(window, _SHORTEST))
  q, k = _even(T, min(blocks.q, most)), _even(S, min(blocks.k, most))
  tile_q, tile_k = min(q, blocks.tile_q), min(k, blocks.tile_k)
  return blocks._replace(
      q=q, k=k, tile_q=tile_q if q % tile_q == 0 else 128,
      tile_k=tile_k if k % tile_k == 0 else 128)


def most_keys(H, V, itemsize):
  """Keys whose dk and dv take a third of VMEM: sums and two output buffers.

  Tests put a function with less of them in its place.
  """
  lanes = round_up(H, LANES) + round_up(V, LANES)
  bytes_a_key = lanes * (4 + 2 * itemsize)
  return max(vmem_bytes() // 3 // bytes_a_key // 512, 1) * 512


def _even(length, most):
  """Cuts a length in blocks of up to round_up(most, 128), with a small end."""
  blocks = pl.cdiv(length, round_up(most, 128))
  return round_up(pl.cdiv(length, blocks), 128)


class Visits(NamedTuple):
  """The blocks that a kernel visits, in order: its grid's last dimension.

  Attributes:
    words: [B or 1, L] int32, see `unpack`. Rows are query-major.
    steps: how many of the L words some row of the batch needs: an int, or a
      traced int32 scalar.
    kinds: the kinds that can occur, known at trace time.
  """
  words: object
  steps: object
  kinds: tuple


def unpack(word):
  """Returns (query block, key block, kind, first, last) of a visit."""
  low = MAX_BLOCKS - 1
  return ((word >> _BITS) & low, word & low, (word >> _KIND) & 3,
          (word >> _FIRST) & 1, (word >> _LAST) & 1)


def visits(blocks, T, S, q_ids, kv_ids, q_offset, *, causal, window,
           folded=False):
  """Lists the blocks of [queries, keys] in which the mask leaves anything.

  Each query block gets at least one visit, so that its output is written.
  Without ids and with an int as q_offset, everything is known at trace time.

  Args:
    blocks: Blocks.
    T: queries.
    S: keys.
    q_ids: [B,T] int32, or None.
    kv_ids: [B,S] int32, or None.
    q_offset: an int, or an int32 scalar.
    causal: as for flash_attention.
    window: likewise.
    folded: whether the T queries of several heads share a block, the only one.
  """
  rows, columns, kind = candidates(
      blocks, T, S, q_offset, causal=causal, window=window)
  if folded:
    kind = kind - (kind == TRIANGLE) * (TRIANGLE - PARTIAL)
  if q_ids is None and isinstance(q_offset, int):
    words = _pack(np, rows[None], columns[None], kind[None], rows.size)
    return Visits(words, rows.size, tuple(np.unique(kind).tolist()))
  if q_ids is not None:
    kind = _refine(blocks, kind, rows, columns, q_ids, kv_ids)
  kind = jnp.atleast_2d(kind)
  kept = (kind != EMPTY) | np.append(rows[1:] != rows[:-1], True)
  order = jnp.argsort(~kept, axis=1, stable=True)
  count = kept.sum(1, dtype=jnp.int32, keepdims=True)
  # The tail of a row of the batch that needs less repeats its last visit,
  # emptied: the same blocks, so that nothing is fetched.
  step = np.arange(rows.size)
  order = jnp.take_along_axis(order, jnp.minimum(step, count - 1), 1)
  kind = jnp.take_along_axis(kind, order, 1)
  kind = jnp.where(step < count, kind, EMPTY)
  words = _pack(jnp, jnp.asarray(rows)[order], jnp.asarray(columns)[order],
                kind, count)
  kinds = (EMPTY, FULL)
  if causal or S % blocks.k or q_ids is not None:
    kinds += (PARTIAL,)
  if causal and blocks.q == blocks.k and not folded:
    kinds += (TRIANGLE,)
  return Visits(words, jnp.max(count), tuple(sorted(kinds)))


def candidates(blocks, T, S, q_offset, *, causal, window):
  """Returns what positions alone leave: query blocks, key blocks, kinds, [L].

  With a traced q_offset these are all pairs of blocks, and kinds is traced.
  """
  static = isinstance(q_offset, int)
  first = np.arange(0, T, blocks.q)[:, None]
  last = np.minimum(first + blocks.q, T) - 1 + q_offset
  first = first + q_offset
  start = np.arange(0, S, blocks.k)[None, :]
  end = start + blocks.k - 1
  some = (first <= last) & (start <= end)
  full = some & (end < S)
  triangle = some & False
  if causal:
    some &= start <= last
    full &= end <= first
    if blocks.q == blocks.k:
      triangle = first == start
  if window:
    some &= np.minimum(end, S - 1) > first - window
    full &= start > last - window
  xp = np if static else jnp
  kind = xp.where(full, FULL, xp.where(triangle, TRIANGLE, PARTIAL))
  kind = xp.where(some, kind, EMPTY)
  listed = np.ones(kind.shape, bool)
  if static:
    listed = some.copy()
    listed[:, 0] |= ~some.any(1)
  rows, columns = np.nonzero(listed)
  return rows, columns, kind[rows, columns]


def _pack(xp, rows, columns, kind, count):
  new = rows[:, 1:] != rows[:, :-1]
  edge = xp.ones_like(new, shape=(rows.shape[0], 1))
  first = xp.concatenate([edge, new], 1)
  last = xp.concatenate([new, edge], 1)
  last |= np.arange(rows.shape[1]) == count - 1
  words = (columns + (rows << _BITS) + (kind << _KIND)
           + first * (1 << _FIRST) + last * (1 << _LAST))
  return words.astype(np.int32)


def _refine(blocks, kind, rows, columns, q_ids, kv_ids):
  """Empties pairs of blocks whose ranges of ids do not meet, [B,L]."""
  q_low, q_high = _range(q_ids, blocks.q)
  kv_low, kv_high = _range(kv_ids, blocks.k)
  q_low, q_high = q_low[:, rows], q_high[:, rows]
  kv_low, kv_high = kv_low[:, columns], kv_high[:, columns]
  meet = (q_low <= kv_high) & (kv_low <= q_high)
  same = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
  kind = jnp.where((kind == FULL) & ~same, PARTIAL, kind)
  return jnp.where(meet, kind, EMPTY)


def _range(ids, size):
  """Least and greatest id of each block of `size` ids, [B,blocks]."""
  B, T = ids.shape
  ids = jnp.pad(ids, ((0, 0), (0, -T % size)), mode='edge')
  ids = ids.reshape(B, -1, size)
  return ids.min(2), ids.max(2)
