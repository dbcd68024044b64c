"""The backward kernel of gpu.py: one walk backwards over the chunks of a piece.

From the state before a chunk it first runs forwards, keeping the state before
each group of 4 steps in shared memory. Then, the last group first, it runs
through a group again, keeping its decays and what they leave of each state in
registers, and walks back. So each exponential is computed twice, and no more
than a chunk of states ever exists.

The gradients of B and C are sums over channels. Each thread writes its products
of two steps (32 numbers) into a row of shared memory, and reads a column of a
quarter of the rows; quarters are added at the end of a chunk, the blocks of
channels after the kernel: always in the same order.
"""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels.scan import lanes

_GROUP = 4
_GROUPS = lanes.CHUNK // _GROUP
_COLUMNS = 32  # products that are summed over channels at once
_QUARTERS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, _COLUMNS), (1,))),
    warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


class Step(NamedTuple):
  """What a step needs of a channel's inputs: rows, but for start."""
  d: jax.Array
  slope: jax.Array  # of d with dt
  x: jax.Array
  z: jax.Array | None
  gate: jax.Array | None  # sigmoid(z)
  dy: jax.Array
  start: jax.Array | None

  @property
  def u(self):
    return self.d * self.x

  @property
  def ds(self):
    """The gradient of y before the gate."""
    return self.dy if self.z is None else self.dy * (self.z * self.gate)


def gradients(plan, inputs, states, dy, dhT):
  """Partial sums of the gradients.

  Args:
    plan: lanes.Plan.
    inputs: lanes.Operands.
    states: [B, chunks, S, E, W] of the forward pass.
    dy: [B, T, E].
    dhT: [B, P, S, E, W], what enters each piece from behind.

  Returns:
    List of the gradients of the series, that of A [B, P, S, E, W], of the rows
    [B, P, 2, E], of h0 [B, S, E, W], and of B and C [B, blocks, 2, S, T W].
  """
  B, _, E = dy.shape
  S, W = plan.S, plan.W
  series = [*inputs.series, dy]
  # Tiles of 64 states fill the shared memory.
  stages = 2 if S <= 2 else 1
  f32 = lambda *shape: jax.ShapeDtypeStruct((B, *shape), jnp.float32)
  buffer = functools.partial(plgpu.SMEM, dtype=jnp.float32)
  scratch = dict(
      series=[lanes.series_buffer(stages, a.dtype) for a in series],
      common=lanes.common_buffer(plan, stages),
      state=lanes.tile_buffer(plan, stages, S),
      kept=lanes.tile_buffer(plan, _GROUPS - 1),
      # Rows four words apart: wide words are written without conflicts.
      products=buffer((lanes.LANES, _COLUMNS + 4)),
      quarters=buffer((2, 4, lanes.CHUNK * W)),
      sums=buffer((2, lanes.CHUNK * W)),
      rows=buffer((2, lanes.LANES)),
      ready=plgpu.Barrier(
          num_arrivals=len(series) + 2, num_barriers=stages),
      once=plgpu.Barrier(num_arrivals=3), again=plgpu.Barrier(num_arrivals=1))
  if S > 1:
    scratch |= dict(
        A=lanes.tile_buffer(plan), dA=lanes.tile_buffer(plan, S),
        dh=lanes.tile_buffer(plan, S),
        over_states=buffer((3, lanes.CHUNK, lanes.LANES)))
  return lanes.launch(
      functools.partial(_kernel, stages), plan,
      [*series, *inputs[1:], states, dhT],
      [*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs.series),
       f32(plan.pieces, S, E, W), f32(plan.pieces, 2, E), f32(S, E, W),
       f32(pl.cdiv(E, lanes.LANES), 2, S, plan.steps * W)],
      scratch, name='backward')


def _kernel(stages, plan, *refs, **scratch):
  smem = types.SimpleNamespace(**scratch)
  number = len(smem.series)
  series = refs[:number]
  common, rows, A, states, dhT, *outputs = refs[number:]
  *dseries, dA_out, drows, dh0, dcommon = outputs
  batch, piece, channels = lanes.coordinates()
  block = lax.axis_index('block')
  first, n = lanes.span(plan, piece)
  single = plan.S == 1
  load = lambda ref: lanes.load(ref, lanes.TILE)

  dh_buffer = smem.kept.at[pl.ds(1, 1)] if single else smem.dh
  lanes.fetch(smem.once, [
      (A.at[0, channels], smem.kept.at[0]),
      (dhT.at[batch, piece, :, channels], dh_buffer),
      (rows.at[:, channels], smem.rows)])
  bias, skip = map(lanes.load_row, (smem.rows.at[0], smem.rows.at[1]))
  nothing = lanes.zeros((lanes.LANES,), lanes.ROW)
  empty = lanes.zeros((lanes.LANES, plan.W), lanes.TILE)
  carry = nothing, nothing
  if single:
    decay = load(smem.kept.at[0])
    carry += load(smem.kept.at[1]), empty
  else:
    for s in range(plan.S):
      smem.dA[s] = empty
  plgpu.commit_smem()

  def copies(chunk):
    steps = lanes.steps_of(chunk)
    return [(source.at[batch, steps, channels], buffer)
            for source, buffer in zip(series, smem.series)] + [
                (common.at[batch, steps], smem.common),
                (states.at[batch, chunk, :, channels], smem.state)]

  def visit(chunk, slot, carry):
    load_step = functools.partial(_load_step, plan, smem, slot, chunk, bias)
    finish = functools.partial(_finish, plan, smem, slot, skip)

    def store_sums(s):
      _add_quarters(smem)
      where = pl.ds(chunk * lanes.CHUNK * plan.W, lanes.CHUNK * plan.W)
      plgpu.copy_smem_to_gmem(smem.sums, dcommon.at[batch, block, :, s, where])

    if single:
      carry = _walk_back(plan, smem, slot, 0, decay, load_step, finish, carry)
      store_sums(0)
    else:
      carry = _walk_tiles_back(
          plan, smem, slot, lambda s: A.at[s, channels], load_step, finish,
          store_sums, carry)
    plgpu.commit_smem()
    steps = lanes.steps_of(chunk)
    for buffer, target in zip(smem.series, dseries):
      plgpu.copy_smem_to_gmem(
          buffer.at[slot], target.at[batch, steps, channels])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return carry

  dbias, dskip, *tiles = lanes.walk(
      lambda i: first + n - 1 - i, n, stages, copies, smem.ready, visit, carry)
  smem.rows[0], smem.rows[1] = dbias, dskip
  dA_buffer = smem.dA if not single else smem.kept.at[pl.ds(0, 1)]
  if single:
    smem.kept[1], smem.kept[0] = tiles
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem.rows, drows.at[batch, piece, :, channels])
  plgpu.copy_smem_to_gmem(dA_buffer, dA_out.at[batch, piece, :, channels])
  pl.when(piece == 0)(lambda: plgpu.copy_smem_to_gmem(
      dh_buffer, dh0.at[batch, :, channels]))
  plgpu.wait_smem_to_gmem(0)


def _load_step(plan, smem, slot, chunk, bias, t):
  x, dt, *z, dy = (lanes.load_row(buffer.at[slot, t]) for buffer in smem.series)
  d, slope = lanes.step_size(plan, dt + bias, chunk * lanes.CHUNK + t)
  z, gate = (z[0], lanes.sigmoid(z[0])) if z else (None, None)
  start = lanes.starts(plan, smem.common.at[slot, t])
  return Step(d, slope, x, z, gate, dy, start)


def _advance(step, h, A, B):
  """The decay of a step, what it leaves of h, and the new h."""
  decay = jnp.exp2(lanes.by_row(step.d, A) * A)
  left = decay * lanes.unless(step.start, h)
  return decay, left, left + lanes.by_row(step.u, A) * lanes.by_column(B, A)


def _finish(plan, smem, slot, skip, t, step, dinput, dexponent, total, sums):
  """Writes the gradients of a step over its inputs.

  Args:
    plan: lanes.Plan.
    smem: the buffers.
    slot: stage of the series.
    skip: D, a row.
    t: step of the chunk.
    step: Step.
    dinput: gradient of d x.
    dexponent: gradient of d by its decays, in units of log 2.
    total: y before the skip and the gate.
    sums: gradients of the bias and of D, to be added to.
  """
  dbias, dskip = sums
  ds = step.ds
  gradients = [step.d * dinput + skip * ds,
               (step.x * dinput + lanes.LN2 * dexponent) * step.slope]
  if plan.gated:
    slope = step.gate * (1 + step.z * (1 - step.gate))
    gradients.append(step.dy * (total + skip * step.x) * slope)
  for buffer, value in zip(smem.series, gradients):
    buffer[slot, t] = value.astype(buffer.dtype)
  return dbias + gradients[1], dskip + ds * step.x


def _walk_tiles_back(plan, smem, slot, decay, load_step, finish, store_sums,
                     sums):
  """_walk_back for several tiles of states, whose sums wait in shared memory.

  Args:
    plan: lanes.Plan.
    smem: the buffers.
    slot: stage of the series.
    decay: the s-th tile of A in global memory, of s.
    load_step: Step of t.
    finish: _finish from t on.
    store_sums: called after each tile with its index.
    sums: see _finish.
  """
  parts = range(3)
  nothing = lanes.zeros((lanes.LANES,), lanes.ROW)
  for i in parts:
    for t in range(lanes.CHUNK):
      smem.over_states[i, t] = nothing

  def keep(t, step, *values):
    *values, none = values
    for i, value in enumerate(values):
      smem.over_states[i, t] = value + lanes.load_row(smem.over_states.at[i, t])
    return none

  def visit(s, none):
    lanes.fetch(smem.again, [(decay(s), smem.A)])
    tiles = [lanes.load(ref, lanes.TILE)
             for ref in (smem.A, smem.dh.at[s], smem.dA.at[s])]
    smem.dh[s], smem.dA[s] = _walk_back(
        plan, smem, slot, s, tiles[0], load_step, keep, tiles[1:])
    store_sums(s)
    return none

  lax.fori_loop(0, plan.S, visit, ())
  return lax.fori_loop(
      0, lanes.CHUNK, lambda t, sums: finish(t, load_step(t), *(
          lanes.load_row(smem.over_states.at[i, t]) for i in parts), sums),
      sums)


def _walk_back(plan, smem, slot, s, A, load_step, finish, carry):
  """Takes the s-th tile of states back through a chunk."""
  direct = lambda t: lanes.directions(plan, smem.common.at[slot, t], s)
  tile = lambda ref: lanes.load(ref, lanes.TILE)

  def forward(g, h):
    smem.kept[g] = h
    for k in range(_GROUP):
      t = g * _GROUP + k
      *_, h = _advance(load_step(t), h, A, direct(t)[0])
    return h

  def backward(i, carry):
    *sums, dh, dA, h = carry
    g = _GROUPS - 1 - i
    times = [g * _GROUP + k for k in range(_GROUP)]
    steps = [load_step(t) for t in times]
    decays, lefts, totals = [], [], []
    for k, (t, step) in enumerate(zip(times, steps)):
      B, C = direct(t)
      decay, left, h = _advance(step, h, A, B)
      totals.append(jnp.sum(h * lanes.by_column(C, A), axis=1))
      _sum_channels(plan, smem, 1, t, k, h * lanes.by_row(step.ds, A),
                    last=_GROUP - 1)
      decays.append(decay)
      lefts.append(left)
    for k, t, step, decay, left, total in reversed(list(zip(
        range(_GROUP), times, steps, decays, lefts, totals))):
      B, C = direct(t)
      dh = dh + lanes.by_row(step.ds, A) * lanes.by_column(C, A)
      _sum_channels(plan, smem, 0, t, k, dh * lanes.by_row(step.u, A), last=0)
      dleft = dh * left
      dinput = jnp.sum(dh * lanes.by_column(B, A), axis=1)
      dexponent = jnp.sum(dleft * A, axis=1)
      dA = dA + dleft * lanes.by_row(step.d, A)
      dh = lanes.unless(step.start, decay * dh)
      sums = finish(t, step, dinput, dexponent, total, sums)
    return *sums, dh, dA, tile(smem.kept.at[jnp.maximum(g - 1, 0)])

  h = lax.fori_loop(0, _GROUPS - 1, forward, tile(smem.state.at[slot, s]))
  *carry, _ = lax.fori_loop(0, _GROUPS, backward, (*carry, h))
  return tuple(carry)


def _sum_channels(plan, smem, kind, t, k, product, *, last):
  """Adds a step's products to the quarters, two or four steps at a time.

  Args:
    plan: lanes.Plan.
    smem: the buffers.
    kind: 0 for B, 1 for C.
    t: step of the chunk.
    k: its place in the group.
    product: tile.
    last: which place of a group comes last.
  """
  together = _COLUMNS // plan.W
  place = k % together
  smem.products[:, pl.ds(place * plan.W, plan.W)] = product
  if place != last % together:
    return
  plgpu.commit_smem()
  rows = lanes.load(smem.products.at[:, pl.ds(0, _COLUMNS)], _QUARTERS)
  # Eight short chains of additions that overlap, then one.
  rows = jnp.sum(rows.reshape(4, 8, 4, _COLUMNS), axis=0)
  columns = pl.ds((t - place) * plan.W, _COLUMNS)
  smem.quarters[kind, :, columns] = jnp.sum(rows, axis=0)
  plgpu.commit_smem()


def _add_quarters(smem):
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for kind in range(2):
    parts = [smem.quarters[kind, i] for i in range(4)]
    smem.sums[kind] = sum(parts[1:], parts[0])
  plgpu.commit_smem()
