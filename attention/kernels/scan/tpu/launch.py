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

  d, u              [rows,chunk/8,8,channels] steps' sizes, those times x
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

from typing import NamedTuple

import jax
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


class Launch:
  """One kernel launch: layouts, block specs and grid.

  The grid is (rows of the batch, parts of the channels, chunks, blocks of
  channels). Blocks of channels come innermost, so that they share the chunk's
  B and C; their states stay in VMEM.

  A method returns an array as the kernel sees it, or the shape of an output,
  with the spec of its blocks; None for an array that is None.
  """

  def __init__(self, operands, rule, *, backward):
    B, T, E = operands.x.shape
    self.M = operands.A.shape[1]
    M = round_up(self.M, SUBLANES)
    if LANES % M:
      M = 64
    cut = blocks.sizes(B, T, E, M)
    self.plan = Plan(rule, cut, T, E, M)
    self.backward = backward
    n_blocks, chunks = pl.cdiv(E, cut.channels), pl.cdiv(T, cut.chunk)
    # Two parts where two cores would not find two rows.
    parts = 2 if B // cut.rows % 2 and n_blocks % 2 == 0 else 1
    self.grid = B // cut.rows, parts, chunks, n_blocks // parts
    self.B = B
    self.n_steps, self.n_channels = chunks * cut.chunk, n_blocks * cut.channels
    # Of B or C in a chunk.
    self.vectors = pl.cdiv(cut.chunk * M, SUBLANES * LANES)

  def _spec(self, shape, index, *, memory_space=None):
    """A block chosen by rows, part, chunk and block of all channels."""
    chunks, n_blocks = self.grid[2:]

    def index_map(b, p, t, e):
      return index(
          b, p, chunks - 1 - t if self.backward else t, p * n_blocks + e)

    return pl.BlockSpec(shape, index_map, memory_space=memory_space)

  def operands(self, operands):
    """Of both kernels, by name."""
    x, dt, A, B, C, D, z, dt_bias, h0, starts = operands
    if dt_bias is None:
      dt_bias = jnp.zeros(self.plan.E)
    return dict(
        x=self.series(x), dt=self.series(dt),
        A=self._channels(A.astype(jnp.float32).T * LOG2E, self.plan.M),
        B=self._shared(B), C=self._shared(C), D=self._channels(D[None], 1),
        dt_bias=self._channels(dt_bias[None], 1), z=self.series(z),
        h0=None if self.backward else self.state(h0),
        starts=self._starts(starts))

  def series(self, x):
    """[B,T,E], as it is."""
    return None if x is None else (x, self.out_series(x)[1])

  def state(self, h):
    """[B,E,M] -> [B,M,E], needed with the first chunk."""
    plan, n_blocks = self.plan, self.grid[3]
    h = pad(h.astype(jnp.float32).swapaxes(1, 2), plan.M, self.n_channels)
    return h, pl.BlockSpec(
        (plan.blocks.rows, plan.M, plan.blocks.channels),
        lambda b, p, t, e: (
            b, 0, p * n_blocks + jnp.where(t == 0, e, n_blocks - 1)))

  def saved(self, h):
    return h, self.out_saved()[1]

  def _channels(self, x, rows):
    """[rows,E], in whole blocks."""
    return (pad(x.astype(jnp.float32), rows, self.n_channels), self._spec(
        (rows, self.plan.blocks.channels), lambda b, p, t, e: (0, e)))

  def _shared(self, x):
    """B or C [B,T,M] -> [B,chunks,vectors,8,128]."""
    x = pad(x.astype(jnp.float32), self.n_steps, self.plan.M)
    x = x.reshape(self.B, self.grid[2], -1)
    x = pad(x, self.vectors * SUBLANES * LANES)
    x = x.reshape(*x.shape[:2], self.vectors, SUBLANES, LANES)
    return x, self._spec((self.plan.blocks.rows, None, *x.shape[2:]),
                         lambda b, p, t, e: (b, t, 0, 0, 0))

  def _starts(self, starts):
    """[B,T] -> [B,chunks,1,chunk+1]; behind a chunk's starts their number."""
    if starts is None:
      return None
    cut = self.plan.blocks
    starts = pad(starts.astype(jnp.int32), self.n_steps)
    starts = starts.reshape(self.B, self.grid[2], 1, cut.chunk)
    starts = jnp.append(starts, starts.sum(3, keepdims=True), axis=3)
    return starts, self._spec(
        (cut.rows, None, 1, cut.chunk + 1), lambda b, p, t, e: (b, t, 0, 0),
        memory_space=pltpu.SMEM)

  def out_series(self, x):
    """As x."""
    cut = self.plan.blocks
    return None if x is None else (
        jax.ShapeDtypeStruct(x.shape, x.dtype), self._spec(
            (cut.rows, cut.chunk, cut.channels), lambda b, p, t, e: (b, t, e)))

  def out_state(self, states=None):
    """[B,M,E], written with the last chunk."""
    states, cut = states or self.plan.M, self.plan.blocks
    chunks, n_blocks = self.grid[2:]
    shape = self.B, states, self.n_channels
    return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(
        (cut.rows, states, cut.channels), lambda b, p, t, e: (
            b, 0, p * n_blocks + jnp.where(t == chunks - 1, e, 0)))

  def out_saved(self):
    """[B,chunks,M,E], states before each chunk."""
    plan = self.plan
    shape = self.B, self.grid[2], plan.M, self.n_channels
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._spec(
        (plan.blocks.rows, None, plan.M, plan.blocks.channels),
        lambda b, p, t, e: (b, t, 0, e))

  def out_shared(self):
    """[B,parts,chunks,vectors,8,128], gradient of B or C."""
    shape = self.B, *self.grid[1:3], self.vectors, SUBLANES, LANES
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._spec(
        (self.plan.blocks.rows, None, None, *shape[3:]),
        lambda b, p, t, e: (b, p, t, 0, 0, 0))

  def scratch_series(self):
    cut = self.plan.blocks
    return cut.rows, cut.chunk // SUBLANES, SUBLANES, cut.channels

  def scratch_shared(self):
    M = self.plan.M
    steps = self.vectors * SUBLANES * LANES // M
    return self.plan.blocks.rows, steps, M, LANES

  def scratch_partial(self):
    cut = self.plan.blocks
    return len(cut.streams) * cut.strip * SUBLANES, LANES

  def scratch_state(self, states=None):
    cut = self.plan.blocks
    return self.grid[3], cut.rows, states or self.plan.M, cut.channels

  def run(self, kernel, *, name, operands, outputs, scratch, operations):
    """`mosaic_tpu.launch`, of so many operations a step, channel and state."""
    size = self.B * self.n_steps * self.n_channels * self.plan.M
    return mosaic_tpu.launch(
        kernel, self.plan, name=name, grid=self.grid, operands=operands,
        outputs=outputs, scratch=scratch, flops=operations * size,
        transcendentals=size, bounds_checks=False)

  def restore_state(self, h):
    """[B,M,E] of a kernel -> [B,E,M] of A's M."""
    return h[:, :self.M, :self.plan.E].swapaxes(1, 2)

  def restore_shared(self, x):
    """[B,parts,chunks,vectors,8,128] -> [B,T,M], summed over the parts."""
    plan = self.plan
    x = x.sum(1).reshape(self.B, self.grid[2], -1)
    x = x[:, :, :plan.blocks.chunk * plan.M]
    x = x.reshape(self.B, self.n_steps, plan.M)
    return x[:, :plan.T, :self.M]
