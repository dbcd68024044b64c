"""What both TPU kernels of the selective scan do with a chunk of time.

A stream is 128 channels of one row of the batch, its state [M, 128]. Time goes
in strips of unrolled steps. What needs no state is done for the whole chunk,
before the steps and after them, some rows at a time. Between them, series are
in tiles of 8 steps: a load broadcasts one of them over the states.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.mosaic_tpu import LANES, LOG2E, SUBLANES

# log(1 + e) / e for e in [0, 1], to a relative 3e-8.
_LOG1P = (0.0052534578, -0.0295885074, 0.078361668, -0.136747697, 0.191114311,
          -0.248443699, 0.333192713, -0.499995015, 0.999999971)


class Place(NamedTuple):
  """Where a program is in the grid; each is a scalar."""
  block: object  # of channels, of those that share B and C
  last_block: object  # whether it is the last of them
  first: object  # whether the chunk is the first that is taken
  last: object
  steps: object  # of the series from the chunk's start on
  channels: object  # likewise, from the block's start on


def place(plan, *, backward=False):
  """Returns the Place of this program; backward takes the last chunk first."""
  t, chunks = pl.program_id(2), pl.num_programs(2)
  e, blocks = pl.program_id(3), pl.num_programs(3)
  chunk = chunks - 1 - t if backward else t
  return Place(
      e, e == blocks - 1, t == 0, t == chunks - 1,
      plan.T - chunk * plan.blocks.chunk,
      plan.E - (pl.program_id(1) * blocks + e) * plan.blocks.channels)


def each_rows(plan, body):
  """Calls body(row of the batch, rows of the chunk, tiles of 8) for all."""
  cut = plan.blocks
  size = cut.strip * (2 if cut.strips % 2 == 0 else 1)
  tiles = size // SUBLANES

  def some(i, _):
    for r in range(cut.rows):
      body(r, pl.ds(pl.multiple_of(i * size, size), size),
           pl.ds(i * tiles, tiles))

  jax.lax.fori_loop(0, cut.chunk // size, some, None)


def tiled(rows):
  return rows.reshape(-1, SUBLANES, rows.shape[-1])


def flat(tiles):
  return tiles.reshape(-1, tiles.shape[-1])


def mask(plan, place, rows):
  """[rows,channels], what the series has, or None where that is all."""
  shape, masks = (rows.size, plan.blocks.channels), []
  if plan.T % plan.blocks.chunk:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    masks.append(row < place.steps - rows.start)
  if plan.E % plan.blocks.channels:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    masks.append(lane < place.channels)
  return functools.reduce(jnp.logical_and, masks) if masks else None


def masked(valid, x):
  """Zero where not valid."""
  return x if valid is None else jnp.where(valid, x, 0.0)


def step_sizes(ref, plan, r, rows):
  """d and d x, or x, of some rows, and x in float32."""
  x = ref.x[r, rows].astype(jnp.float32)
  d = raw_step_sizes(ref, r, rows)
  if plan.rule.dt_softplus:
    d = _softplus(d)
  return d, d * x if plan.rule.scale_input else x, x


def raw_step_sizes(ref, r, rows):
  """Before softplus."""
  return ref.dt[r, rows].astype(jnp.float32) + ref.dt_bias[...]


def gated(ref, r, rows, y):
  """y silu(z)."""
  if ref.z is None:
    return y
  z = ref.z[r, rows].astype(jnp.float32)
  return y * (z * sigmoid(z))


def _softplus(x):
  """log(1 + e^x), to float32 also where it is small.

  Small steps are the rule, and 1 + e^x would lose their low bits.
  """
  e = jnp.exp2(jnp.abs(x) * -LOG2E)
  series = _LOG1P[0]
  for coefficient in _LOG1P[1:]:
    series = series * e + coefficient
  return jnp.maximum(x, 0.0) + series * e


def sigmoid(x):
  """1 / (1 + e^-x), to float32 on both sides of zero."""
  e = jnp.exp2(jnp.abs(x) * -LOG2E)
  # The best parabola is within 1/99 of 1 / (1 + e); Newton squares the error.
  inverse = (32 / 99 * e - 80 / 99) * e + 98 / 99
  for _ in range(2):
    inverse *= 2 - (1 + e) * inverse
  return jnp.where(x < 0, e, 1.0) * inverse


def broadcast_lanes(plan, copies):
  """Copies each number of B and C to a vector's lanes.

  A row of 128, repeated and transposed, is the columns of some steps' states,
  repeated. Sums that have such a shape are set to zero here, where half of the
  stores are idle.

  Args:
    plan: Plan.
    copies: refs of (B or C, its copy, the sum or None).
  """
  def vector(i, _):
    for numbers, wide, total in copies:
      for r in range(plan.blocks.rows):
        for j in range(SUBLANES):
          row = numbers[r, i, j:j + 1]
          columns = jnp.broadcast_to(row, (LANES, LANES)).T
          steps = _steps_of_row(plan, i, j)
          columns = columns.reshape(steps.size, plan.M, LANES)
          wide[r, steps] = columns
          if total is not None:
            total[r, steps] = jnp.zeros_like(columns)

  jax.lax.fori_loop(0, copies[0][0].shape[1], vector, None)


def sum_lanes(plan, sums):
  """Sums over the lanes: `broadcast_lanes` the other way round.

  Args:
    plan: Plan.
    sums: refs of (what is summed, dB or dC).
  """
  def vector(i, _):
    for wide, out in sums:
      for r in range(plan.blocks.rows):
        for j in range(SUBLANES):
          columns = wide[r, _steps_of_row(plan, i, j)].reshape(LANES, LANES)
          out[r, i, j:j + 1] = jnp.sum(columns.T, axis=0, keepdims=True)

  jax.lax.fori_loop(0, sums[0][1].shape[1], vector, None)


def _steps_of_row(plan, i, j):
  """The steps whose states are row j of vector i of B or C."""
  steps = LANES // plan.M
  return pl.ds((i * SUBLANES + j) * steps, steps)


def where_starts(ref, plan, body):
  """Calls body(starts), with None where the chunk has none.

  A start costs a selection for every state, at every step of the chunk.
  """
  if ref.starts is None:
    body(None)
    return
  number = sum(ref.starts[r, 0, plan.blocks.chunk]
               for r in range(plan.blocks.rows))
  pl.when(number > 0)(lambda: body(ref.starts))
  pl.when(number == 0)(lambda: body(None))


def unless_starts(starts, r, t, x):
  """Zero where step t is the first of a document."""
  if starts is None:
    return x
  return jnp.where(starts[r, 0, t] != 0, 0.0, x)


def forward_steps(ref, plan, starts, i, states, visit):
  """Takes the states of the streams through the steps of strip i.

  Args:
    ref: of which d, u, A and wide_B are read.
    plan: Plan.
    starts: ref or None.
    i: number of the strip.
    states: [M,128] of each stream.
    visit: called with k, for each step of the strip, and for each stream the
      states before and after.
  """
  states = list(states)
  for k in range(plan.blocks.strip):
    t, each = i * plan.blocks.strip + k, []
    for g, (r, lanes) in enumerate(plan.blocks.streams):
      before = states[g]
      d, u = (step(plan, x, i, k, r, lanes) for x in (ref.d, ref.u))
      kept = jnp.exp2(d * ref.A[:, lanes]) * before
      kept = unless_starts(starts, r, t, kept)
      states[g] = kept + u * ref.wide_B[r, t]
      each.append((before, states[g]))
    visit(k, each)
  return tuple(states)


def start_output(ref, plan, i, k, each):
  """Begins the sums of h C of a step; `each` as `forward_steps` has it."""
  for g, (r, _) in enumerate(plan.blocks.streams):
    C = ref.wide_C[r, i * plan.blocks.strip + k]
    start_sum(plan, ref.partial, g, k, each[g][1] * C)


def step(plan, series, i, k, r, lanes):
  """Step k of strip i as a row [1,128]."""
  tile = i * (plan.blocks.strip // SUBLANES) + k // SUBLANES
  return series[r, tile, pl.ds(k % SUBLANES, 1), lanes]


def start_sum(plan, partial, g, k, x):
  """Sums [M,128] down to 8 sublanes, and stores these 8 tiles apart.

  Those of eight steps make eight tiles, to be added up by `finish_sums`.
  """
  x = sum((x[j:j + SUBLANES] for j in range(SUBLANES, x.shape[0], SUBLANES)),
          start=x[:SUBLANES])
  first = (g * plan.blocks.strip + k // SUBLANES * SUBLANES) * SUBLANES
  partial[pl.ds(first + k % SUBLANES, SUBLANES, stride=SUBLANES)] = x


def finish_sums(plan, partial, out, i):
  """Completes the sums that `start_sum` has begun for the steps of strip i."""
  tiles = plan.blocks.strip // SUBLANES
  for g, (r, lanes) in enumerate(plan.blocks.streams):
    for tile in range(tiles):
      first = (g * tiles + tile) * SUBLANES * SUBLANES
      out[r, i * tiles + tile, :, lanes] = functools.reduce(
          jnp.add, [partial[first + j:first + j + SUBLANES]
                    for j in range(0, SUBLANES * SUBLANES, SUBLANES)])


def load(plan, state):
  """[M,128] of each stream."""
  return tuple(state[r, :, lanes] for r, lanes in plan.blocks.streams)


def store(plan, state, values):
  for (r, lanes), value in zip(plan.blocks.streams, values):
    state[r, :, lanes] = value
