"""What both TPU kernels of flash attention do with a tile of scores."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.flash.tpu import blocks
from attention.kernels.flash.tpu.blocks import EMPTY, PARTIAL, TRIANGLE
from attention.kernels.mosaic_tpu import LOG2E, NT, dot


class Visit(NamedTuple):
  """A block of queries against a block of keys; each is a scalar."""
  i: object  # position of the first query, counted from key 0
  j: object  # first key
  kind: object  # what the mask leaves
  first: object  # whether the visit is the first of its queries
  last: object


class Tile(NamedTuple):
  """Slices of a block's queries and keys, and whether they need a mask."""
  queries: slice
  keys: slice
  masked: bool


def visit(ref, plan):
  """Returns the Visit of this program."""
  step = pl.program_id(0) * plan.listed + pl.program_id(3)
  i, j, kind, first, last = blocks.unpack(ref.visits[step])
  return Visit(i * plan.blocks.q + ref.q_offset[0], j * plan.blocks.k, kind,
               first == 1, last == 1)


def each_kind(plan, visit, body):
  """Calls body(kind) with the kind of the visit, known when it is compiled."""
  for kind in plan.kinds:
    if kind != EMPTY:
      pl.when(visit.kind == kind)(functools.partial(body, kind))


def tiles(plan, kind):
  """Returns the Tiles of a block of which a mask leaves anything."""
  cut, found = plan.blocks, []
  plain = not plan.rule.window and not plan.segments and not plan.S % cut.k
  for row in range(0, cut.q, cut.tile_q):
    end = row + cut.tile_q
    for column in range(0, end if kind == TRIANGLE else cut.k, cut.tile_k):
      stop, masked = column + cut.tile_k, kind == PARTIAL
      if kind == TRIANGLE:
        masked = stop > row + 1 or not plain
        stop = min(stop, end)
      found.append(Tile(slice(row, end), slice(column, stop), masked))
  return found


def scores(plan, keys, queries):
  """Scores [keys,queries] times log2(e), and their slope under the softcap."""
  s, rule = dot(keys, queries, NT), plan.rule
  if not rule.softcap:
    return s * (rule.scale * LOG2E), None
  bounded = jnp.tanh(s * (rule.scale / rule.softcap))
  return bounded * (rule.softcap * LOG2E), 1 - bounded * bounded


def mask(ref, plan, visit, tile):
  """The mask [keys,queries] of a tile."""
  queries, keys, _ = tile
  shape = keys.stop - keys.start, queries.stop - queries.start
  key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  limit = visit.i - visit.j - keys.start
  if plan.folded:
    query = jax.lax.rem(query + queries.start, plan.folded)
  else:
    limit += queries.start
  ahead = key - query
  seen = []
  if plan.rule.causal:
    seen.append(ahead <= limit)
  if plan.rule.window:
    seen.append(ahead > limit - plan.rule.window)
  if plan.S % plan.blocks.k:
    seen.append(key < plan.S - visit.j - keys.start)
  if plan.segments:
    kv_ids = jnp.broadcast_to(ref.kv_ids[:, keys], shape[::-1]).T
    seen.append(kv_ids == ref.q_ids[:, queries])
  return functools.reduce(jnp.logical_and, seen)
