"""How the TPU kernels of chunked linear attention are launched.

Refs, of a block of G query heads and their key head. S and z, decays and what
is made of them are float32, the rest of the operands' dtypes:

  q, dq             [G,steps,H]
  y, dy             [G,steps,V]
  k, dk             [steps,H]           gradients are those of the G heads
  v, dv             [steps,V]
  decay, ddecay     [1,steps]           the decay's logarithm, to base 2
  segments          [2,steps]           see `blocks.segments`
  s0, dsT; z0, dzT  [H,V]; [1,H]        before the first block that is taken
  sT, ds0; zT, dz0  likewise            after the last one
  saved_S, saved_z  likewise            before the block

In VMEM, for the chunks of a block:

  pairs             [chunks,C,C]        see `chunk.Decays`
  before, after     [chunks,C,128]      likewise, equal on all lanes
  every_S           [chunks,H,V]        states before each chunk
  every_z           [chunks,1,H]        likewise

and from block to block:

  S, dS; z, dz      [H,V]; [1,H]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import mosaic_tpu
from attention.kernels.chunked import Rule
from attention.kernels.chunked.tpu import blocks
from attention.kernels.mosaic_tpu import LANES, LOG2E, pad, padded_width


class Plan(NamedTuple):
  """What a kernel is specialised to."""
  rule: Rule
  blocks: blocks.Blocks
  T: int

  @property
  def n_blocks(self):
    return pl.cdiv(self.T, self.blocks.steps)


class Launch:
  """One kernel launch: layouts, block specs and grid.

  The grid is (rows of the batch, programs of a row, blocks of steps). The P
  programs of a row are the K key heads, each several times if it has more query
  heads than one program takes: k, v and the states are read where they lie, the
  gradients of a head's programs are to be added up.

  A method returns an array as the kernel sees it, or the shape of an output,
  with the spec of its blocks; None for an array that is None.
  """

  def __init__(self, operands, rule, *, backward):
    q = operands.q
    self.B, T, N, self.H = q.shape
    self.K, self.V = operands.v.shape[2:]
    cut = blocks.sizes(T, N // self.K, widest=max(self.H, self.V),
                       itemsize=q.dtype.itemsize)
    self.G = cut.heads
    self.P = N // self.G
    self.plan = Plan(rule, cut, T)
    self.backward = backward
    # Of S and z in the kernels.
    self.S = padded_width(self.H), padded_width(self.V)
    self.z = None if rule.normalize is None else (1, self.S[0])

  def _spec(self, shape, index, *, memory_space=None):
    """A block chosen by batch, program, key head and block of steps."""
    def index_map(b, p, i):
      if self.backward:
        i = self.plan.n_blocks - 1 - i
      head = jax.lax.div(p, jnp.int32(self.P // self.K))
      return index(b, p, head, i)

    return pl.BlockSpec(shape, index_map, memory_space=memory_space)

  def operands(self, operands, dy=None):
    """By name."""
    q, k, v, decay, s0, z0, starts = operands
    return dict(
        segments=self._segments(starts), q=self._queries(q), k=self._keys(k),
        v=self._keys(v), dy=self._queries(dy), decay=self._decays(decay),
        s0=None if self.backward else self._state(s0),
        z0=None if self.backward else self._state(z0))

  def saved(self, x):
    return None if x is None else (x, self.out_saved(x.shape[3:])[1])

  def first_state(self, x):
    """[B,K,...] -> [B,P,...]: to the first of a head's programs, else 0."""
    if x is None:
      return None
    x = self._state(x)[0]
    x = pad(x[:, :, None], self.P // self.K, *x.shape[2:])
    x = x.reshape(self.B, self.P, *x.shape[3:])
    return x, self.out_state(x.shape[2:])[1]

  def _segments(self, starts):
    """[B,T] -> [B,blocks,2,steps]."""
    if starts is None:
      return None
    return blocks.segments(starts, self.plan), self._spec(
        (None, None, 2, self.plan.blocks.steps),
        lambda b, p, h, i: (b, i, 0, 0), memory_space=pltpu.SMEM)

  def _queries(self, x):
    """[B,T,N,H] -> [B,P,G,T,H]."""
    if x is None:
      return None
    x = jnp.swapaxes(pad(x, padded_width(x.shape[3])), 1, 2)
    x = x.reshape(self.B, self.P, self.G, *x.shape[2:])
    return x, self.out_queries(x.shape[4], x.dtype)[1]

  def _keys(self, x):
    """[B,T,K,H] -> [B,K,T,H]."""
    x = jnp.swapaxes(pad(x, padded_width(x.shape[3])), 1, 2)
    return x, self._spec((None, None, self.plan.blocks.steps, x.shape[3]),
                         lambda b, p, h, i: (b, h, i, 0))

  def _decays(self, x):
    """[B,T,K] -> [B,K,1,steps], to base 2."""
    if x is None:
      return None
    # A product has no room for 0 * inf; exp of this is 0 just the same.
    x = jnp.maximum(x.astype(jnp.float32), -1e30) * LOG2E
    steps = self.plan.blocks.steps
    x = pad(jnp.swapaxes(x, 1, 2), self.plan.n_blocks * steps)
    return x[:, :, None], self._spec(
        (None, None, 1, steps), lambda b, p, h, i: (b, h, 0, i))

  def _state(self, x):
    """[B,K,H,V], or [B,K,H] as a row."""
    if x is None:
      return None
    x = x.astype(jnp.float32)
    x = pad(x[:, :, None], *self.z) if x.ndim == 3 else pad(x, *self.S)
    return x, self._spec((None, None, *x.shape[2:]),
                         lambda b, p, h, i: (b, h, 0, 0))

  def out_queries(self, width, dtype):
    """[B,P,G,T,width]."""
    cut, width = self.plan.blocks, padded_width(width)
    shape = self.B, self.P, self.G, self.plan.T, width
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.G, cut.steps, width),
        lambda b, p, h, i: (b, p, 0, i, 0))

  def out_keys(self, width, dtype):
    """[B,P,T,width]."""
    width = padded_width(width)
    # Parts of a sum are not rounded.
    dtype = dtype if self.P == self.K else jnp.float32
    shape = self.B, self.P, self.plan.T, width
    return jax.ShapeDtypeStruct(shape, dtype), self._spec(
        (None, None, self.plan.blocks.steps, width),
        lambda b, p, h, i: (b, p, i, 0))

  def out_decays(self, decay):
    """[B,P,1,steps]."""
    if decay is None:
      return None
    steps = self.plan.blocks.steps
    shape = self.B, self.P, 1, self.plan.n_blocks * steps
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._spec(
        (None, None, 1, steps), lambda b, p, h, i: (b, p, 0, i))

  def out_state(self, shape):
    """[B,P,...], of the shape of S or z."""
    if shape is None:
      return None
    return jax.ShapeDtypeStruct((self.B, self.P, *shape), jnp.float32), (
        self._spec((None, None, *shape), lambda b, p, h, i: (b, p, 0, 0)))

  def out_saved(self, shape):
    """[B,P,blocks,...], states before each block."""
    if shape is None:
      return None
    whole = self.B, self.P, self.plan.n_blocks, *shape
    return jax.ShapeDtypeStruct(whole, jnp.float32), self._spec(
        (None, None, None, *shape), lambda b, p, h, i: (b, p, i, 0, 0))

  def scratch_states(self, shape):
    """Of each chunk of a block."""
    return None if shape is None else (self.plan.blocks.chunks, *shape)

  def scratch_decays(self, decay):
    """What `chunk.write_decays` writes, by name."""
    cut = self.plan.blocks
    if decay is None:
      return dict(pairs=None, before=None, after=None)
    vectors = cut.chunks, cut.chunk, LANES
    return dict(
        pairs=(cut.chunks, cut.chunk, cut.chunk), before=vectors,
        after=vectors if self.backward else None)

  def run(self, kernel, *, name, operands, outputs, scratch, products):
    """`mosaic_tpu.launch`, of so many multiplications a step and head."""
    plan = self.plan
    return mosaic_tpu.launch(
        kernel, plan, name=name, grid=(self.B, self.P, plan.n_blocks),
        operands=operands, outputs=outputs, scratch=scratch,
        flops=2 * self.B * self.P * self.G * plan.T * products,
        transcendentals=0)

  def restore_queries(self, x, width):
    """[B,P,G,T,H] -> [B,T,N,width]."""
    x = x.reshape(self.B, self.P * self.G, *x.shape[3:])
    return jnp.swapaxes(x[..., :width], 1, 2)

  def restore_keys(self, x, width):
    """[B,P,T,H] -> [B,T,K,width], summed over a head's programs."""
    return jnp.swapaxes(self._of_heads(x, total=True), 1, 2)[..., :width]

  def restore_decays(self, x):
    """[B,P,1,steps] -> [B,T,K], likewise."""
    if x is None:
      return None
    x = self._of_heads(x, total=True)[:, :, 0, :self.plan.T]
    return jnp.swapaxes(x, 1, 2)

  def restore_states(self, S, z, *, total):
    """[B,P,...] -> S [B,K,H,V] and z [B,K,H]; see `_of_heads`."""
    S = self._of_heads(S, total=total)[:, :, :self.H, :self.V]
    if z is not None:
      z = self._of_heads(z, total=total)[:, :, 0, :self.H]
    return S, z

  def _of_heads(self, x, *, total):
    """[B,P,...] -> [B,K,...]: the sum of a head's programs, or any one."""
    if self.P == self.K:
      return x
    x = x.reshape(self.B, self.K, -1, *x.shape[2:])
    return x.sum(2) if total else x[:, :, 0]
