"""What the attention kernels are launched with: plan, grid and memory.

A thread block owns 128 rows, of queries or, in the kernel of dk and dv, of
keys, and walks over columns, keys or queries, in blocks. In global memory, T
and S being multiples of 8:

  q, dout, out, dq   [B,T,N,H or V]
  k, v, dk, dv       [B,S,K,H or V]
  lse, delta         [B,N,T in whole tiles]  lse in log 2 where it is read
  own_ids, ring_ids  [B,..]       segment ids of rows and of columns, int32
  positions          [T]          of queries, counted from the first key
  spans              [B or 1,tiles,5]  blocks.Span

In shared memory, by warpgroup or by stage of the ring:

  of rows            [2,64,..]    for each computing warpgroup its own
  of columns         [stages,block,..]  filled while they are read
  out                [2,64,V]     on its way out, where q leaves no room for it
  own_ready          barriers of each warpgroup's rows
  ready, k_ready, v_ready  barriers of each stage: filled
  free, k_free, v_free     barriers of each stage: read by both warpgroups
  turn               barrier at which both warpgroups meet

Tiles vary fastest over the grid, so that the thread blocks that run together
share their columns in the L2 cache.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels import mosaic_gpu
from attention.kernels.flash import Rule
from attention.kernels.flash.gpu import backward_kernel, blocks, forward_kernel
from attention.kernels.flash.gpu.blocks import HEIGHT, WARPGROUPS
from attention.kernels.mosaic_gpu import ROWS, barrier, buffer, like, output


class Plan(NamedTuple):
  """What a kernel is compiled for, beside the shapes of its operands."""
  rule: Rule
  segments: bool
  S: int
  G: int  # query heads of a key head
  block: int  # columns of a score tile
  stages: int  # buffers of the ring


def forward(plan, arrays, *, operands):
  """Runs forward_kernel.kernel.

  Args:
    plan: Plan.
    arrays: {name: array}: q, k and v, padded.
    operands: as the op has them, for ids and offset.

  Returns:
    {'out', 'lse'}, padded.
  """
  q = arrays['q']
  B, T, N, H = q.shape
  V = arrays['v'].shape[-1]
  tiles = pl.cdiv(T, HEIGHT)
  return mosaic_gpu.launch(
      forward_kernel.kernel, plan, name='flash_forward',
      grid=dict(b=B, n=N, tile=tiles),
      operands=arrays | blocks.query_spans(plan, operands),
      outputs=dict(out=output(B, T, N, V, dtype=q.dtype),
                   lse=output(B, N, tiles * HEIGHT)),
      scratch=dict(
          q=_own_tile(H, q.dtype),
          k=_ring_tile(plan, H, q.dtype), v=_ring_tile(plan, V, q.dtype),
          lse=buffer(WARPGROUPS, ROWS),
          out=None if H == V else _own_tile(V, q.dtype),
          own_ready=barrier(1 + plan.segments, WARPGROUPS),
          k_ready=barrier(1 + plan.segments, plan.stages),
          v_ready=barrier(1, plan.stages),
          k_free=barrier(WARPGROUPS, plan.stages),
          v_free=barrier(WARPGROUPS, plan.stages),
          turn=barrier(WARPGROUPS)) | _id_buffers(plan),
      warpgroups=WARPGROUPS + 1)


def dq(plan, arrays, *, operands):
  """Runs backward_kernel.dq_kernel.

  Args:
    plan: Plan.
    arrays: {name: array}: q, k, v, dout, lse and delta, padded.
    operands: as the op has them, for ids and offset.

  Returns:
    [B,T,N,H], padded.
  """
  q = arrays['q']
  B, T, N, H = q.shape
  V = arrays['v'].shape[-1]
  return mosaic_gpu.launch(
      backward_kernel.dq_kernel, plan, name='flash_dq',
      grid=dict(b=B, n=N, tile=pl.cdiv(T, HEIGHT)),
      operands=arrays | blocks.query_spans(plan, operands),
      outputs=dict(dq=like(q)),
      scratch=dict(
          q=_own_tile(H, q.dtype), dout=_own_tile(V, q.dtype),
          lse=buffer(WARPGROUPS, ROWS), delta=buffer(WARPGROUPS, ROWS),
          k=_ring_tile(plan, H, q.dtype), v=_ring_tile(plan, V, q.dtype),
          own_ready=barrier(4 + plan.segments, WARPGROUPS),
          ready=barrier(2 + plan.segments, plan.stages),
          free=barrier(WARPGROUPS, plan.stages)) | _id_buffers(plan),
      warpgroups=WARPGROUPS + 1)['dq']


def dkv(plan, arrays, *, names, operands):
  """Runs backward_kernel.dkv_kernel for dk, dv or both; see dq.

  Returns:
    [B,S,K,..], padded, for each of the names.
  """
  q, k, v = (arrays[name] for name in 'qkv')
  B, _, K, H = k.shape
  V = v.shape[-1]
  positions = jnp.arange(arrays['lse'].shape[-1], dtype=jnp.int32)
  results = mosaic_gpu.launch(
      backward_kernel.dkv_kernel, plan, name='flash_' + '_'.join(names),
      grid=dict(b=B, n=K, tile=pl.cdiv(plan.S, HEIGHT)),
      operands=arrays | blocks.key_spans(plan, operands) | dict(
          positions=positions + operands.q_offset),
      outputs=dict(dk=like(k) if 'dk' in names else None,
                   dv=like(v) if 'dv' in names else None),
      scratch=dict(
          k=_own_tile(H, q.dtype), v=_own_tile(V, q.dtype),
          q=_ring_tile(plan, H, q.dtype), dout=_ring_tile(plan, V, q.dtype),
          lse=buffer(plan.stages, plan.block),
          delta=buffer(plan.stages, plan.block),
          positions=buffer(plan.stages, plan.block, dtype=jnp.int32),
          own_ready=barrier(2 + plan.segments, WARPGROUPS),
          ready=barrier(5 + plan.segments, plan.stages),
          free=barrier(WARPGROUPS, plan.stages)) | _id_buffers(plan),
      warpgroups=WARPGROUPS + 1)
  return [results[name] for name in names]


def _own_tile(width, dtype):
  return mosaic_gpu.tile(WARPGROUPS, ROWS, width, dtype=dtype)


def _ring_tile(plan, width, dtype):
  return mosaic_gpu.tile(plan.stages, plan.block, width, dtype=dtype)


def _id_buffers(plan):
  own = buffer(WARPGROUPS, ROWS, dtype=jnp.int32)
  ring = buffer(plan.stages, plan.block, dtype=jnp.int32)
  return dict(own_ids=own if plan.segments else None,
              ring_ids=ring if plan.segments else None)
