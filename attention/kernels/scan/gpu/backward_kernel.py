"""The gradients: one walk backwards over the chunks of a part of the sequence.

Each exponential is computed twice, and no more than a chunk of states ever
exists: docs/kernels.md has the order of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.scan.gpu import chunk as chunks
from attention.kernels.scan.gpu.chunk import (
    CHUNK,
    load_row,
    load_tile,
    per_channel,
    per_state,
)

_GROUP = 4
GROUPS = CHUNK // _GROUP
COLUMNS = 32  # products that are summed over channels at once
_QUARTERS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, COLUMNS), (1,))),
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
  scaled: bool

  @property
  def u(self):
    """What the states take in."""
    return self.d * self.x if self.scaled else self.x

  @property
  def ds(self):
    """The gradient of y before the gate."""
    return self.dy if self.z is None else self.dy * (self.z * self.gate)


def kernel(gmem, smem, plan):
  batch, part, channels = place = chunks.coordinates()
  block = lax.axis_index('e')
  single = plan.tiles == 1

  dh_buffer = smem.kept.at[pl.ds(1, 1)] if single else smem.dh
  mosaic_gpu.copy_in(
      [(gmem.A.at[0, channels], smem.kept.at[0]),
       (gmem.dhT.at[batch, part, :, channels], dh_buffer),
       (gmem.rows.at[:, channels], smem.rows)], smem.once)
  mosaic_gpu.wait(smem.once)
  bias, skip = load_row(smem.rows.at[0]), load_row(smem.rows.at[1])
  nothing, empty = chunks.zero_row(), chunks.zero_tile(plan)
  carry = nothing, nothing
  if single:
    A = load_tile(smem.kept.at[0])
    carry += load_tile(smem.kept.at[1]), empty
  else:
    for s in range(plan.tiles):
      smem.dA[s] = empty
  plgpu.commit_smem()

  def visit(chunk, slot, carry):
    load_step = functools.partial(_load_step, smem, plan, slot, chunk, bias)
    finish = functools.partial(_finish, smem, plan, slot, skip)

    def store_sums(s):
      _add_quarters(smem)
      where = pl.ds(chunk * CHUNK * plan.width, CHUNK * plan.width)
      mosaic_gpu.copy_out(
          [(smem.sums, gmem.dcommon.at[batch, block, :, s, where])])

    if single:
      carry = _walk_back(smem, plan, slot, 0, A, load_step, finish, carry)
      store_sums(0)
    else:
      carry = _walk_tiles_back(
          smem, plan, slot, lambda s: gmem.A.at[s, channels], load_step, finish,
          store_sums, carry)
    mosaic_gpu.copy_out([
        (buffer.at[slot], target.at[batch, chunks.steps(chunk), channels])
        for buffer, target in (
            (smem.x, gmem.dx), (smem.dt, gmem.ddt), (smem.z, gmem.dz))
        if target is not None])
    mosaic_gpu.wait_read()
    return carry

  dbias, dskip, *tiles = chunks.walk(
      gmem, smem, plan, place, visit=visit, carry=carry, states=gmem.states,
      reverse=True)
  smem.rows[0], smem.rows[1] = dbias, dskip
  dA_buffer = smem.kept.at[pl.ds(0, 1)] if single else smem.dA
  if single:
    smem.kept[1], smem.kept[0] = tiles
  mosaic_gpu.copy_out([
      (smem.rows, gmem.drows.at[batch, part, :, channels]),
      (dA_buffer, gmem.dA.at[batch, part, :, channels])])
  pl.when(part == 0)(lambda: plgpu.copy_smem_to_gmem(
      dh_buffer, gmem.dh0.at[batch, :, channels]))
  mosaic_gpu.wait_written()


def _load_step(smem, plan, slot, chunk, bias, t):
  x, dt = load_row(smem.x.at[slot, t]), load_row(smem.dt.at[slot, t])
  z = load_row(smem.z.at[slot, t]) if plan.gated else None
  dy = load_row(smem.dy.at[slot, t])
  d, slope = chunks.step_size(plan, dt + bias, chunk * CHUNK + t)
  gate = chunks.sigmoid(z) if plan.gated else None
  start = chunks.starts(plan, smem.common.at[slot, t])
  return Step(d, slope, x, z, gate, dy, start, plan.rule.scale_input)


def _advance(step, h, A, B):
  """The decay of a step, what it leaves of h, and the new h."""
  decay = jnp.exp2(per_channel(step.d, A) * A)
  left = decay * chunks.unless(step.start, h)
  return decay, left, left + per_channel(step.u, A) * per_state(B, A)


def _finish(smem, plan, slot, skip, t, step, dinput, dexponent, total, sums):
  """Writes the gradients of a step over its inputs.

  Args:
    smem: the buffers.
    plan: launch.Plan.
    slot: stage of the series.
    skip: D, a row.
    t: step of the chunk.
    step: Step.
    dinput: gradient of u.
    dexponent: gradient of d by its decays, in units of log 2.
    total: y before the skip and the gate.
    sums: gradients of the bias and of D, to be added to.
  """
  dbias, dskip = sums
  ds = step.ds
  dx, ddt = dinput, mosaic_gpu.LN2 * dexponent
  if step.scaled:
    dx, ddt = step.d * dinput, step.x * dinput + ddt
  dx, ddt = dx + skip * ds, ddt * step.slope
  gradients = [(smem.x, dx), (smem.dt, ddt)]
  if plan.gated:
    slope = step.gate * (1 + step.z * (1 - step.gate))
    gradients.append((smem.z, step.dy * (total + skip * step.x) * slope))
  for buffer, gradient in gradients:
    chunks.store_row(buffer.at[slot, t], gradient)
  return dbias + ddt, dskip + ds * step.x


def _walk_tiles_back(smem, plan, slot, A, load_step, finish, store_sums,
                     sums):
  """_walk_back for several tiles of states, whose sums wait in shared memory.

  Args:
    smem: the buffers.
    plan: launch.Plan.
    slot: stage of the series.
    A: its s-th tile in global memory, of s.
    load_step: Step of t.
    finish: _finish from t on.
    store_sums: called after each tile with its index.
    sums: see _finish.
  """
  nothing = chunks.zero_row()
  for i in range(3):
    for t in range(CHUNK):
      smem.over_states[i, t] = nothing

  def keep(t, step, *values):
    *values, none = values
    for i, value in enumerate(values):
      smem.over_states[i, t] = value + load_row(smem.over_states.at[i, t])
    return none

  def visit(s, none):
    mosaic_gpu.copy_in([(A(s), smem.A)], smem.again)
    mosaic_gpu.wait(smem.again)
    A_s = load_tile(smem.A)
    carry = load_tile(smem.dh.at[s]), load_tile(smem.dA.at[s])
    smem.dh[s], smem.dA[s] = _walk_back(
        smem, plan, slot, s, A_s, load_step, keep, carry)
    store_sums(s)
    return none

  lax.fori_loop(0, plan.tiles, visit, ())
  return lax.fori_loop(
      0, CHUNK, lambda t, sums: finish(t, load_step(t), *(
          load_row(smem.over_states.at[i, t]) for i in range(3)), sums),
      sums)


def _walk_back(smem, plan, slot, s, A, load_step, finish, carry):
  """Takes the s-th tile of states back through a chunk."""
  direct = lambda t: chunks.directions(plan, smem.common.at[slot, t], s)

  def forward(g, h):
    smem.kept[g] = h
    for k in range(_GROUP):
      t = g * _GROUP + k
      *_, h = _advance(load_step(t), h, A, direct(t)[0])
    return h

  def backward(i, carry):
    *sums, dh, dA, h = carry
    g = GROUPS - 1 - i
    times = [g * _GROUP + k for k in range(_GROUP)]
    steps = [load_step(t) for t in times]
    decays, lefts, totals = [], [], []
    for k, (t, step) in enumerate(zip(times, steps)):
      B, C = direct(t)
      decay, left, h = _advance(step, h, A, B)
      totals.append(jnp.sum(h * per_state(C, A), axis=1))
      _sum_channels(smem, plan, 1, t, k, h * per_channel(step.ds, A),
                    last=_GROUP - 1)
      decays.append(decay)
      lefts.append(left)
    for k, t, step, decay, left, total in reversed(list(zip(
        range(_GROUP), times, steps, decays, lefts, totals))):
      B, C = direct(t)
      dh = dh + per_channel(step.ds, A) * per_state(C, A)
      _sum_channels(smem, plan, 0, t, k, dh * per_channel(step.u, A), last=0)
      dleft = dh * left
      dinput = jnp.sum(dh * per_state(B, A), axis=1)
      dexponent = jnp.sum(dleft * A, axis=1)
      dA = dA + dleft * per_channel(step.d, A)
      dh = chunks.unless(step.start, decay * dh)
      sums = finish(t, step, dinput, dexponent, total, sums)
    return *sums, dh, dA, load_tile(smem.kept.at[jnp.maximum(g - 1, 0)])

  h = lax.fori_loop(0, GROUPS - 1, forward, load_tile(smem.state.at[slot, s]))
  *carry, _ = lax.fori_loop(0, GROUPS, backward, (*carry, h))
  return tuple(carry)


def _sum_channels(smem, plan, kind, t, k, product, *, last):
  """Adds a step's products to the quarters, two or four steps at a time.

  Args:
    smem: the buffers.
    plan: launch.Plan.
    kind: 0 for B, 1 for C.
    t: step of the chunk.
    k: its place in the group.
    product: tile.
    last: which place of a group comes last.
  """
  together = COLUMNS // plan.width
  place = k % together
  smem.products[:, pl.ds(place * plan.width, plan.width)] = product
  if place != last % together:
    return
  plgpu.commit_smem()
  rows = mosaic_gpu.load(smem.products.at[:, pl.ds(0, COLUMNS)], _QUARTERS)
  # Eight short chains of additions that overlap, then one.
  rows = jnp.sum(rows.reshape(4, 8, 4, COLUMNS), axis=0)
  columns = pl.ds((t - place) * plan.width, COLUMNS)
  smem.quarters[kind, :, columns] = jnp.sum(rows, axis=0)
  plgpu.commit_smem()


def _add_quarters(smem):
  mosaic_gpu.wait_read()
  for kind in range(2):
    parts = [smem.quarters[kind, i] for i in range(4)]
    smem.sums[kind] = sum(parts[1:], parts[0])
