"""How the TPU kernels of chunked linear attention are launched.

Refs, of a block of G query heads and their state. S and z, decays and what is
made of them are float32, the rest of the operands' dtypes:

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


class Launch(mosaic_tpu.Launch):
  """Layouts and grid: (rows of the batch, programs of a row, blocks of steps).

  The P programs of a row are the K states, each several times if it has more
  query heads than one program takes. What several programs share, a state with
  its v or a head of q or k, is read where it lies; the gradients of a head's
  programs are to be added up.
  """

  def __init__(self, operands, rule, *, backward):
    q, k, v = operands.q, operands.k, operands.v
    self.B, T, N, H = q.shape
    self.J = k.shape[2]
    self.K, V = v.shape[2:]
    cut = blocks.sizes(
        T, max(N // self.K, 1), widest=max(H, V), itemsize=q.dtype.itemsize)
    self.P = max(N, self.K) // cut.heads
    # Blocks of q: fewer than programs if states share them.
    self.Q = N // cut.heads
    self.H, self.V = padded_width(H), padded_width(V)
    self.plan = Plan(rule, cut, T)
    self.backward = backward
    n_blocks = self.plan.n_blocks
    self.grid = self.B, self.P, n_blocks
    self.axes = dict(
        batch=(self.B, None), program=(self.P, None), queries=(self.Q, None),
        keys=(self.J, None), state=(self.K, None), block=(n_blocks, None),
        steps=(T, cut.steps), padded_steps=(n_blocks * cut.steps, cut.steps))
    self.query_steps = self.B * self.P * cut.heads * T
    # Shapes of the states in the kernels.
    self.S = self.H, self.V
    self.z = None if rule.normalize is None else (1, self.H)

  def place(self, b, p, i):
    if self.backward:
      i = self.plan.n_blocks - 1 - i
    head = {heads: jax.lax.div(p, jnp.int32(self.P // heads))
            for heads in {self.K, self.J} | {self.Q} - {self.P}}
    return dict(
        batch=b, program=p, keys=head[self.J],
        queries=p if self.Q == self.P else head[self.Q],
        state=head[self.K], block=i, steps=i, padded_steps=i)

  def queries(self, width, of='program'):
    return self.layout('batch', of, self.plan.blocks.heads, 'steps', width)

  def saved(self, shape):
    """States before each block."""
    return self.layout('batch', 'program', 'block', *shape)

  def operands(self, operands, *, dy=None):
    """By name; dy of the backward kernel."""
    q, k, v, decay, s0, z0, starts = operands
    segments = None
    if starts is not None:
      segments = self.layout(
          'batch', 'block', 2, self.plan.blocks.steps,
          memory_space=pltpu.SMEM).of(blocks.segments(starts, self.plan))
    if decay is not None:
      # A product has no room for 0 * inf; exp of this is 0 just the same.
      decay = jnp.maximum(decay.astype(jnp.float32), -1e30) * LOG2E
      decay = jnp.swapaxes(decay, 1, 2)[:, :, None]
    heads = lambda x, axis, width: self.layout(
        'batch', axis, 'steps', width).of(jnp.swapaxes(x, 1, 2))
    return dict(
        segments=segments, q=self._queries(q, self.H, 'queries'),
        k=heads(k, 'keys', self.H), v=heads(v, 'state', self.V),
        dy=self._queries(dy, self.V, 'program'),
        decay=self.layout('batch', 'state', 1, 'padded_steps').of(decay),
        s0=None if self.backward else self._state(s0),
        z0=None if self.backward else self._state(z0))

  def _queries(self, x, width, axis):
    """[B,T,N,H] -> [B,P,G,T,H], or Q of an axis of queries."""
    if x is None:
      return None
    x = jnp.swapaxes(x, 1, 2)
    return self.queries(width, axis).of(
        x.reshape(self.B, self.axes[axis][0], -1, *x.shape[2:]))

  def _state(self, x):
    """[B,K,H,V], or [B,K,H] as a row."""
    if x is None:
      return None
    shape, x = (self.S, x) if x.ndim == 4 else (self.z, x[:, :, None])
    return self.layout('batch', 'state', *shape).of(x.astype(jnp.float32))

  def first_state(self, x):
    """[B,K,...] -> [B,P,...]: to the first of a head's programs, else 0."""
    if x is None:
      return None
    x, _ = self._state(x)
    shape = x.shape[2:]
    x = pad(x[:, :, None], self.P // self.K, *shape)
    return self.layout('batch', 'program', *shape).of(
        x.reshape(self.B, self.P, *shape))

  def out_queries(self, width, dtype):
    return self.queries(width).out(self._exact(dtype, self.Q))

  def out_heads(self, heads, width, dtype):
    """Of J or K heads."""
    return self.layout('batch', 'program', 'steps', width).out(
        self._exact(dtype, heads))

  def _exact(self, dtype, heads):
    """Parts of a sum are not rounded."""
    return dtype if heads == self.P else jnp.float32

  def out_decay(self, decay):
    if decay is None:
      return None
    return self.layout('batch', 'program', 1, 'padded_steps').out()

  def out_state(self, shape):
    """Of the shape S or z."""
    if shape is None:
      return None
    return self.layout('batch', 'program', *shape).out()

  def scratch_decays(self, decay):
    """What `chunk.write_decays` writes, by name."""
    if decay is None:
      return dict(pairs=None, before=None, after=None)
    cut = self.plan.blocks
    columns = cut.chunks, cut.chunk, LANES
    return dict(pairs=(cut.chunks, cut.chunk, cut.chunk), before=columns,
                after=columns if self.backward else None)

  def restore_queries(self, x, width):
    """[B,P,G,T,H] -> [B,T,N or K,width]."""
    x = x.reshape(self.B, -1, *x.shape[3:])
    return jnp.swapaxes(x[..., :width], 1, 2)

  def restore_dq(self, x, width):
    """Likewise, summed over the programs that share a query."""
    return self.restore_queries(
        self._of_heads(x, self.Q, total=True), width)

  def restore_heads(self, x, heads, width):
    """[B,P,T,H] -> [B,T,J or K,width], summed over a head's programs."""
    x = self._of_heads(x, heads, total=True)
    return jnp.swapaxes(x, 1, 2)[..., :width]

  def restore_decay(self, x):
    """[B,P,1,steps] -> [B,T,K], likewise."""
    if x is None:
      return None
    x = self._of_heads(x, self.K, total=True)[:, :, 0, :self.plan.T]
    return jnp.swapaxes(x, 1, 2)

  def restore_states(self, S, z, like, *, total):
    """[B,P,...] -> S [B,K,H,V], of the shape of another, and z [B,K,H]."""
    H, V = like.shape[2:]
    S = self._of_heads(S, self.K, total=total)[:, :, :H, :V]
    if z is not None:
      z = self._of_heads(z, self.K, total=total)[:, :, 0, :H]
    return S, z

  def _of_heads(self, x, heads, *, total):
    """[B,P,...] -> [B,heads,...]: the sum of a head's programs, or any one."""
    if heads == self.P:
      return x
    x = x.reshape(self.B, heads, -1, *x.shape[2:])
    return x.sum(2) if total else x[:, :, 0]
