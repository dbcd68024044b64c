"""What the kernels of chunks are launched with: plan, grid and memory.

In global memory, T being a multiple of 8:

  q, dy, y, dq       [B,T,K*G,H or V]  queries and outputs; J heads of q if
                     states share them
  k, v, dk, dv       [B,T,K,H or V]  keys and values; likewise of k
  x, y               [B,T,K*G,..]    what the states are sums of; likewise of x
  scales             [B,K*G,chunks*R,CHUNK]  for each chunk the R rows w, kept
                     (repeated) and with a normaliser u
  s, last            [B,K,H,V]       state that enters, state that leaves
  z, z_last          [B,K,H]         likewise of the normaliser
  states, dstates    [B*K*chunks,H,V]  state before, gradient after each chunk
  z_states, dz       [B,K*chunks,H]  likewise, H filled up to a multiple of 64
  inverse            [B,N,chunks*CHUNK]  1 / normaliser
  levels, ids, before, after  chunk.Weights
  rows, columns, ends  [B,K,chunks*CHUNK]  what the logs of decays get: those up
                     to each step; those from it on, to the steps of its chunk
                     and to its end

Shared memory has the same names for what is cut out of them, and

  q, dy, inverse     [slots,..]      queries, ahead of their use
  x, y, scales       [STAGES,..]     chunks, ahead of their use
  scaled             [CHUNK,64]      x times w
  before, end        [64,columns]    S on its way out; in and out in float32
  delta              [slots,CHUNK]   from the warpgroup of dq to the other one
  own_ready, start   barriers of what comes once
  ready, delta_ready, free  barriers of each slot: filled, delta written, read
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import mosaic_gpu
from attention.kernels.chunked.gpu import (
    backward_kernel,
    forward_kernel,
    states,
)
from attention.kernels.chunked.gpu.chunk import CHUNK, LEVELS
from attention.kernels.mosaic_gpu import ROWS, barrier, buffer, like, output

STAGES = 3


class Plan(NamedTuple):
  """What a kernel is compiled for, beside the shapes of its operands."""
  K: int
  G: int  # query heads of a state
  chunks: int
  normalize: float | None
  reverse: bool = False  # The last chunk comes first.


def walk(plan, *, x, y, scales, s, z):
  """Runs states.kernel; see the glossary.

  Returns:
    {'states', in the dtype of x, 'last', 'z_states', 'z_last'}, those of z None
    without z.
  """
  B, K, H, V = s.shape
  columns = V if V <= 128 else 64
  summed, scaled = z is not None, scales is not None
  tile = functools.partial(mosaic_gpu.tile, dtype=x.dtype, cut=math.gcd(H, V))
  return mosaic_gpu.launch(
      states.kernel, plan,
      name='chunked_backward_states' if plan.reverse else 'chunked_states',
      grid=dict(b=B, k=K, h=pl.cdiv(H, ROWS), v=pl.cdiv(V, columns)),
      operands=dict(x=x, y=y, scales=scales, s=s, z=z),
      outputs=dict(
          states=output(B * K * plan.chunks, H, V, dtype=x.dtype),
          last=output(*s.shape),
          z_states=output(B, K * plan.chunks, pl.cdiv(H, ROWS) * ROWS)
          if summed else None,
          z_last=output(*z.shape) if summed else None),
      scratch=dict(
          x=tile(STAGES, CHUNK, ROWS), y=tile(STAGES, CHUNK, columns),
          scales=buffer(STAGES, scales.shape[2] // plan.chunks, CHUNK)
          if scaled else None,
          scaled=tile(CHUNK, ROWS) if scaled else None,
          before=tile(ROWS, columns),
          end=mosaic_gpu.tile(ROWS, columns, dtype=jnp.float32, cut=V),
          z=buffer(ROWS) if summed else None,
          ready=barrier(2 + scaled, STAGES), start=barrier(1 + summed)))


def forward(plan, *, q, k, v, states, z, weights):
  """Runs forward_kernel.kernel; see the glossary.

  Returns:
    {'y', 'inverse', None without a normaliser}.
  """
  B, T, _, H = q.shape
  N, V = plan.K * plan.G, v.shape[-1]
  summed = z is not None
  slots = min(plan.G, 2)
  tile = functools.partial(mosaic_gpu.tile, dtype=q.dtype, cut=math.gcd(H, V))
  given = weights._replace(after=None, kept=None)._asdict()
  return mosaic_gpu.launch(
      forward_kernel.kernel, plan, name='chunked_outputs',
      grid=dict(b=B, k=plan.K, chunk=plan.chunks),
      operands=dict(q=q, k=k, v=v, states=states, z=z) | given,
      outputs=dict(
          y=output(B, T, N, V, dtype=q.dtype),
          inverse=output(B, N, plan.chunks * CHUNK) if summed else None),
      scratch=dict(
          q=tile(slots, CHUNK, H), k=tile(CHUNK, H), v=tile(CHUNK, V),
          states=tile(H, V), y=tile(CHUNK, V),
          z=buffer(z.shape[-1]) if summed else None,
          inverse=buffer(CHUNK) if summed else None,
          own_ready=barrier(
              3 + summed + sum(x is not None for x in given.values())),
          ready=barrier(1, slots)) | _weight_buffers(given))


def gradients(plan, *, q, k, v, dy, states, dstates, inverse, z, dz, weights):
  """Runs backward_kernel.kernel; see the glossary.

  Returns:
    {'dq', 'dk', 'dv', 'rows', 'columns', 'ends'}, the last three None without
    decays; dq and dk of shared heads one by one in float32.
  """
  B, T, _, H = q.shape
  V = v.shape[-1]
  summed, decayed = z is not None, weights.levels is not None
  slots = min(plan.G, 2)
  tile = functools.partial(mosaic_gpu.tile, dtype=q.dtype, cut=math.gcd(H, V))
  given = weights._replace(kept=None)._asdict()
  # Parts of a sum are not rounded.
  exact = lambda x, heads: x.dtype if x.shape[2] == heads else jnp.float32
  N = plan.K * plan.G
  q_dtype, k_dtype = exact(q, N), exact(k, plan.K)
  sums = output(B, plan.K, plan.chunks * CHUNK) if decayed else None
  per_step = buffer(CHUNK) if decayed else None
  return mosaic_gpu.launch(
      backward_kernel.kernel, plan, name='chunked_backward',
      grid=dict(b=B, k=plan.K, chunk=plan.chunks),
      operands=dict(q=q, k=k, v=v, dy=dy, states=states, dstates=dstates,
                    inverse=inverse, z=z, dz=dz) | given,
      outputs=dict(
          dq=output(B, T, N, H, dtype=q_dtype),
          dk=output(B, T, plan.K, H, dtype=k_dtype), dv=like(v), rows=sums,
          columns=sums, ends=sums),
      scratch=dict(
          q=tile(slots, CHUNK, H), dy=tile(slots, CHUNK, V),
          dq=tile(CHUNK, H, dtype=q_dtype), k=tile(CHUNK, H),
          v=tile(CHUNK, V), dk=tile(CHUNK, H, dtype=k_dtype),
          dv=tile(CHUNK, V),
          states=tile(H, V), dstates=tile(H, V),
          inverse=buffer(slots, CHUNK) if summed else None,
          delta=buffer(slots, CHUNK) if summed else None,
          z=buffer(z.shape[-1]) if summed else None,
          dz=buffer(z.shape[-1]) if summed else None,
          rows=per_step, columns=per_step, ends=per_step,
          own_ready=barrier(
              4 + 2 * summed + sum(x is not None for x in given.values())),
          ready=barrier(2 + summed, slots),
          delta_ready=barrier(1, slots) if summed else None,
          free=barrier(2, slots)) | _weight_buffers(given),
      warpgroups=2)


def _weight_buffers(given):
  """Shared memory for those of a chunk's weights that are given, by name."""
  shapes = dict(levels=(LEVELS, CHUNK), ids=(CHUNK,), before=(CHUNK,),
                after=(CHUNK,))
  return {name: None if x is None else buffer(*shapes[name], dtype=x.dtype)
          for name, x in given.items()}
