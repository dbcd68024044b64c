"""How the TPU kernels of the selective scan are launched.

Refs, float32 but for the series, whose dtypes are those of the operands:

  x, dt, z, dy      [rows,chunk,channels]     series
  y, dx, ddt, dz    likewise
  A                 [M,channels]              times log2(e)
  B, C              [rows,vectors,8,128]      a row of 128: some steps' states
  D, dt_bias        [1,channels]
  starts            [rows,1,chunk+1]          and at the end their number
  h0, dhT           [rows,M,channels]         before the first chunk taken
  hT, dh0           likewise                  after the last one
  saved_h           [rows,M,channels]         state before the chunk
  dB, dC            as B
  dA                [rows,M,channels]         summed over time
  dD, ddt_bias      [rows,8,channels]         likewise, but for 8 steps

In VMEM, between the parts of a chunk:

  d, u              [rows,chunk/8,8,channels] steps' sizes; inputs of states
  s                 likewise                  sum over states of h C
  dd, du, ds        likewise                  gradients; dd times log2(e)
  wide_B, wide_C    [rows,steps,M,128]        each number on all lanes
  dB_acc, dC_acc    likewise                  summed over streams
  partial           [streams strip 8,128]     sums over states, see `chunk`
  partial_d         likewise
  every_h           [chunk+1,streams,M,128]   states before each step and after

and from chunk to chunk, for each block of channels:

  h, dh             [blocks,rows,M,channels]
  dA_acc            likewise
  dD_acc            [blocks,rows,8,channels]
  ddt_bias_acc      likewise
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import mosaic_tpu
from attention.kernels.mosaic_tpu import LANES, LOG2E, SUBLANES, pad, round_up
from attention.kernels.scan import Rule
from attention.kernels.scan.tpu import blocks


class Plan(NamedTuple):
  """What a kernel is specialised to."""
  rule: Rule
  blocks: blocks.Blocks
  T: int
  E: int
  M: int  # whole sublanes


class Launch(mosaic_tpu.Launch):
  """Layouts and grid.

  The grid is (rows of the batch, parts of the channels, chunks, blocks of
  channels). Blocks of channels come innermost, so that they share the chunk's
  B and C; their states stay in VMEM.
  """

  bounds_checks = False

  def __init__(self, operands, rule, *, backward):
    B, T, E = operands.x.shape
    self.M = operands.A.shape[1]
    M = round_up(self.M, SUBLANES)
    if LANES % M:
      M = 64
    cut = blocks.sizes(B, T, E, M)
    self.plan = Plan(rule, cut, T, E, M)
    self.backward = backward
    chunks, n_blocks = pl.cdiv(T, cut.chunk), pl.cdiv(E, cut.channels)
    # Two parts where two cores would not find two rows.
    parts = 2 if B // cut.rows % 2 and n_blocks % 2 == 0 else 1
    self.grid = B // cut.rows, parts, chunks, n_blocks // parts
    self.axes = dict(
        rows=(B, cut.rows), part=(parts, None), chunk=(chunks, None),
        steps=(T, cut.chunk), channels=(E, cut.channels),
        padded_channels=(n_blocks * cut.channels, cut.channels))
    self.padded_steps = chunks * cut.chunk
    self.state_steps = B * self.padded_steps * n_blocks * cut.channels * M
    # B or C of a chunk.
    self.vectors = (
        pl.cdiv(cut.chunk * M, SUBLANES * LANES), SUBLANES, LANES)

  def place(self, b, p, t, e):
    _, _, chunks, n_blocks = self.grid
    t = chunks - 1 - t if self.backward else t
    e = p * n_blocks + e
    return dict(
        rows=b, part=p, chunk=t, steps=t, channels=e, padded_channels=e)

  def _with_first_chunk(self, b, p, t, e):
    """The place of what is read then: afterwards it is not fetched again."""
    n_blocks = self.grid[3]
    return dict(rows=b, padded_channels=p * n_blocks + jnp.where(
        t == 0, e, n_blocks - 1))

  def _with_last_chunk(self, b, p, t, e):
    """The place of what is written then: before, it is not copied out."""
    _, _, chunks, n_blocks = self.grid
    return dict(rows=b, padded_channels=p * n_blocks + jnp.where(
        t == chunks - 1, e, 0))

  def series(self):
    return self.layout('rows', 'steps', 'channels')

  def saved(self):
    """States before each chunk."""
    return self.layout('rows', 'chunk', self.plan.M, 'padded_channels')

  def operands(self, operands):
    """Of both kernels, by name."""
    x, dt, A, B, C, D, z, dt_bias, h0, starts = operands
    series, shared = self.series(), self.layout('rows', 'chunk', *self.vectors)
    channels = lambda rows: self.layout(rows, 'padded_channels')
    if dt_bias is None:
      dt_bias = jnp.zeros(self.plan.E)
    return dict(
        x=series.of(x), dt=series.of(dt),
        A=channels(self.plan.M).of(A.astype(jnp.float32).T * LOG2E),
        B=shared.of(self._shared(B)), C=shared.of(self._shared(C)),
        D=channels(1).of(D[None].astype(jnp.float32)),
        dt_bias=channels(1).of(dt_bias[None].astype(jnp.float32)),
        z=series.of(z), h0=None if self.backward else self.state(h0),
        starts=self._starts(starts))

  def state(self, h):
    """[B,E,M] -> [B,M,E]."""
    return self.layout(
        'rows', self.plan.M, 'padded_channels',
        place=self._with_first_chunk).of(h.astype(jnp.float32).swapaxes(1, 2))

  def _shared(self, x):
    """B or C [B,T,M] -> [B,chunks,vectors,8,128]."""
    x = pad(x.astype(jnp.float32), self.padded_steps, self.plan.M)
    x = x.reshape(len(x), self.grid[2], -1)
    x = pad(x, math.prod(self.vectors))
    return x.reshape(*x.shape[:2], *self.vectors)

  def _starts(self, starts):
    """[B,T] -> [B,chunks,1,chunk+1]; behind a chunk's starts their number."""
    if starts is None:
      return None
    chunk = self.plan.blocks.chunk
    starts = pad(starts.astype(jnp.int32), self.padded_steps)
    starts = starts.reshape(len(starts), -1, 1, chunk)
    starts = jnp.append(starts, starts.sum(3, keepdims=True), axis=3)
    return self.layout('rows', 'chunk', 1, chunk + 1,
                       memory_space=pltpu.SMEM).of(starts)

  def out_state(self, states=None):
    """[B,M,E]."""
    return self.layout(
        'rows', states or self.plan.M, 'padded_channels',
        place=self._with_last_chunk).out()

  def out_shared(self):
    """Gradient of B or C."""
    return self.layout('rows', 'part', 'chunk', *self.vectors).out()

  def scratch_series(self):
    cut = self.plan.blocks
    return cut.rows, cut.chunk // SUBLANES, SUBLANES, cut.channels

  def scratch_shared(self):
    M = self.plan.M
    return self.plan.blocks.rows, math.prod(self.vectors) // M, M, LANES

  def scratch_partial(self):
    cut = self.plan.blocks
    return len(cut.streams) * cut.strip * SUBLANES, LANES

  def scratch_state(self, states=None):
    cut = self.plan.blocks
    return self.grid[3], cut.rows, states or self.plan.M, cut.channels

  def restore_state(self, h):
    """[B,M,E] of a kernel -> [B,E,M]."""
    return h[:, :self.M, :self.plan.E].swapaxes(1, 2)

  def restore_shared(self, x):
    """[B,parts,chunks,vectors,8,128] -> [B,T,M], summed over the parts."""
    x = x.sum(1).reshape(len(x), self.grid[2], -1)
    x = x[:, :, :self.plan.blocks.chunk * self.plan.M]
    x = x.reshape(len(x), self.padded_steps, self.plan.M)
    return x[:, :self.plan.T, :self.M]
