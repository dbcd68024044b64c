"""What the scans are launched with: plan, grid and memory.

The M states are `tiles` of `width` each, and a sequence is cut into `parts`
that run at once (states.py). In global memory, E being a multiple of 8 and
"states" short for [tiles,E,width] in float32:

  x, dt, z, dy       [B,T,E]         series, as y and the gradients dx, ddt, dz
  common             [B,T,2M (+4)]   float32: B, C, whether a document starts
  rows, drows        [2,E]           bias of the step size, weight of the skip;
                     their gradients [B,parts,2,E]
  A                  states          times log2 e; dA [B,parts,states]
  h0, dhT            [B,parts,states]  what enters each part, or from behind
  hT, dh0            [B,states]      what leaves the sequence
  states             [B,chunks,states]  before each chunk
  dcommon            [B,blocks,2,tiles,T width]  gradients of B and C, of each
                     block of channels
  ends, sums         [B,parts,states], [B,parts,E]  what parts end with from
                     zero, and the sums of their step sizes

In shared memory:

  x, dt, z, dy, y, common  [stages,16,..]  chunks, ahead of their use; the
                     gradients of the series leave in their place
  state              [tiles,128,width]  on its way in or out; in the gradients
                     [stages,..], before each chunk
  rows               [2,128]
  kept               [3,128,width]   states before groups of steps
  products, quarters, sums  of the gradients of B and C: of two steps, summed
                     over a quarter of the channels, over all
  A, dA, dh, over_states  what several tiles keep from one chunk to the next
  ready              barriers of each stage: filled
  once, entered, again  barriers of what comes once, or once a tile

Blocks of channels vary fastest over the grid: those that run together share B
and C in the L2 cache.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import mosaic_gpu
from attention.kernels.mosaic_gpu import barrier, buffer, like, output, pad
from attention.kernels.scan import Rule
from attention.kernels.scan.gpu import backward_kernel, forward_kernel, states
from attention.kernels.scan.gpu.backward_kernel import COLUMNS, GROUPS
from attention.kernels.scan.gpu.chunk import CHANNELS, CHUNK

# Barriers would come with every store. Threads keep to their own channel, and
# where they do not, commit_smem is the barrier.
_launch = functools.partial(mosaic_gpu.launch, automatic_barriers=False)


class Plan(NamedTuple):
  """What a kernel is compiled for, beside the shapes of its operands."""
  rule: Rule
  gated: bool
  segments: bool  # Some steps start documents.
  T: int
  tiles: int
  width: int  # states of a tile
  parts: int
  stages: int = 2  # chunks that buffers hold
  reverse: bool = False  # states.kernel: the adjoint.

  @property
  def M(self):
    """The states, filled up to whole tiles."""
    return self.tiles * self.width

  @property
  def chunks(self):
    return pl.cdiv(self.T, CHUNK)

  @property
  def steps(self):
    """T in whole chunks."""
    return self.chunks * CHUNK


def prepare(operands, rule):
  """Returns Plan and {name: array or None}: series, common, rows and A."""
  x, dt, A, B, C, D, z, dt_bias, _, starts = operands
  batch, T, E = x.shape
  M = max(8, 1 << (A.shape[1] - 1).bit_length())
  width = min(M, 16)
  parts = states.number(batch * pl.cdiv(E, CHANNELS), pl.cdiv(T, CHUNK))
  plan = Plan(rule, z is not None, starts is not None, T,
              M // width, width, parts)
  f32 = lambda array: array.astype(jnp.float32)
  common = [pad(f32(array), axis=-1, multiple=M) for array in (B, C)]
  if plan.segments:
    # Four numbers, not one: a TMA copy takes whole 16 bytes.
    common.append(jnp.repeat(f32(starts)[..., None], 4, -1))
  bias = jnp.zeros_like(D) if dt_bias is None else dt_bias
  return plan, dict(
      x=pad(x, axis=-1), dt=pad(dt, axis=-1),
      z=None if z is None else pad(z, axis=-1), dy=None,
      common=jnp.concatenate(common, -1),
      rows=pad(jnp.stack([f32(bias), f32(D)]), axis=-1),
      A=split_states(plan, f32(A) * mosaic_gpu.LOG2E))


def split_states(plan, array):
  """[..,E,M] to float32 [..,tiles,E,width], filled up with zeros."""
  array = pad(array.astype(jnp.float32), axis=-2)
  array = pad(array, axis=-1, multiple=plan.M)
  array = array.reshape(*array.shape[:-1], plan.tiles, plan.width)
  return array.swapaxes(-3, -2)


def join_states(array, E, M):
  """The inverse of split_states."""
  array = array.swapaxes(-3, -2)
  return array.reshape(*array.shape[:-2], -1)[..., :E, :M]


def forward(plan, arrays, *, h0):
  """Runs forward_kernel.kernel: {'y', 'hT', 'states'}."""
  x = arrays['x']
  B, _, E = x.shape
  tiles = plan.tiles, E, plan.width
  return _launch(
      forward_kernel.kernel, plan, name='scan_forward', grid=_grid(plan, x),
      operands=arrays | dict(h0=h0),
      outputs=dict(y=like(x), hT=output(B, *tiles),
                   states=output(B, plan.chunks, *tiles)),
      scratch=_series(plan, arrays) | dict(
          y=_rows(plan, x.dtype), state=_tiles(plan, plan.tiles),
          rows=buffer(2, CHANNELS),
          ready=barrier(3 + plan.gated, plan.stages),
          once=barrier(2), entered=barrier(1)))


def ends(plan, arrays):
  """Runs states.kernel: {'ends', 'sums'}. With plan.reverse arrays has dy."""
  unread = 'x' if plan.reverse else 'z'
  arrays = arrays | {unread: None}
  dt = arrays['dt']
  B, _, E = dt.shape
  return _launch(
      states.kernel, plan,
      name='scan_adjoint_ends' if plan.reverse else 'scan_ends',
      grid=_grid(plan, dt), operands=arrays,
      outputs=dict(ends=output(B, plan.parts, plan.tiles, E, plan.width),
                   sums=output(B, plan.parts, E)),
      scratch=_series(plan, arrays) | dict(
          state=_tiles(plan, plan.tiles), rows=buffer(2, CHANNELS),
          ready=barrier(3 + (plan.reverse and plan.gated), plan.stages),
          once=barrier(2)))


def gradients(plan, arrays, *, states, dhT):
  """Runs backward_kernel.kernel: its outputs, by name.

  Args:
    plan: Plan.
    arrays: of prepare, with dy.
    states: of the forward pass.
    dhT: what enters each part from behind.
  """
  x, z = arrays['x'], arrays['z']
  B, _, E = x.shape
  tiles = plan.tiles, E, plan.width
  # Tiles of 64 states fill the shared memory.
  plan = plan._replace(stages=2 if plan.tiles <= 2 else 1)
  several = plan.tiles > 1
  return _launch(
      backward_kernel.kernel, plan, name='scan_backward', grid=_grid(plan, x),
      operands=arrays | dict(states=states, dhT=dhT),
      outputs=dict(
          dx=like(x), ddt=like(arrays['dt']), dz=None if z is None else like(z),
          dA=output(B, plan.parts, *tiles), drows=output(B, plan.parts, 2, E),
          dh0=output(B, *tiles),
          dcommon=output(B, pl.cdiv(E, CHANNELS), 2, plan.tiles,
                         plan.steps * plan.width)),
      scratch=_series(plan, arrays) | dict(
          state=_tiles(plan, plan.stages, plan.tiles),
          kept=_tiles(plan, GROUPS - 1),
          # Rows four words apart: wide words are written without conflicts.
          products=buffer(CHANNELS, COLUMNS + 4),
          quarters=buffer(2, 4, CHUNK * plan.width),
          sums=buffer(2, CHUNK * plan.width), rows=buffer(2, CHANNELS),
          A=_tiles(plan) if several else None,
          dA=_tiles(plan, plan.tiles) if several else None,
          dh=_tiles(plan, plan.tiles) if several else None,
          over_states=buffer(3, CHUNK, CHANNELS) if several else None,
          ready=barrier(5 + plan.gated, plan.stages), once=barrier(3),
          again=barrier(1)))


def _grid(plan, series):
  B, _, E = series.shape
  return dict(b=B, part=plan.parts, e=pl.cdiv(E, CHANNELS))


def _series(plan, arrays):
  """Shared memory of the chunks' series, and of what their steps share."""
  x, dt, z, dy = (
      None if arrays[name] is None else _rows(plan, arrays[name].dtype)
      for name in ('x', 'dt', 'z', 'dy'))
  common = buffer(plan.stages, CHUNK, arrays['common'].shape[-1])
  return dict(x=x, dt=dt, z=z, dy=dy, common=common)


def _rows(plan, dtype):
  return buffer(plan.stages, CHUNK, CHANNELS, dtype=dtype)


def _tiles(plan, *lead):
  return mosaic_gpu.tile(*lead, CHANNELS, plan.width, dtype=jnp.float32)
