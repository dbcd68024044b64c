"""The gradients of a chunk, given the states around it.

With d_t s the decay from step s to t, b_t that from the state before the chunk,
e_s that to its end, and r_t one over the normaliser (or 1):

  delta_t = r_t (sum_s d_ts (q_t k_s) (dy_t v_s) + b_t q_t S dy_t)
  p_ts = d_ts r_t (dy_t v_s - delta_t)
  dq_t = sum_s p_ts k_s + b_t r_t (S dy_t - delta_t z)
  dk_s = sum_t p_ts q_t + e_s (dS v_s + dz)
  dv_s = sum_t d_ts r_t (q_t k_s) dy_t + e_s dS^T k_s

delta_t = dy_t y_t, but of y before it is rounded: dq is what is left of sums
that nearly cancel, and an error of delta would be in every one of their terms.
The log of d_ts gets p_ts q_t k_s: summed over s it is a part of q_t dq_t, over
t a part of k_s dk_s, with the same roundings.

One warpgroup of a thread block has rows of queries and makes dq, the other one
has rows of keys and makes dk and dv, summed over the group in its order: each
computes the tiles of pairs its own way round, and of a tile only delta is
passed from one to the other.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import mosaic_gpu
from attention.kernels.chunked.gpu.chunk import (
    CHUNK,
    head_of,
    pairs,
    steps,
    weigh,
    weight_copies,
)
from attention.kernels.mosaic_gpu import (
    by_column,
    by_row,
    optional,
    product,
    transposed,
)


def kernel(gmem, smem, plan):
  place = tuple(map(lax.axis_index, ('b', 'k', 'chunk')))
  role = lax.axis_index('warpgroup')

  @pl.when(role == 0)
  def _():
    for member in range(smem.q.shape[0]):
      _load_queries(gmem, smem, plan, place, jnp.int32(member))
    _load_chunk(gmem, smem, plan, place)
    _make_dq(gmem, smem, plan, place)

  @pl.when(role == 1)
  def _():
    _make_dk_dv(gmem, smem, plan, place)


def _load_chunk(gmem, smem, plan, place):
  batch, head, chunk = place
  times = steps(chunk)
  row = head * plan.chunks + chunk
  index = batch * plan.K * plan.chunks + row
  mosaic_gpu.copy_in(
      [(gmem.k.at[batch, times, head_of(gmem.k, head, plan.K)], smem.k),
       (gmem.v.at[batch, times, head], smem.v),
       (gmem.states.at[index], smem.states),
       (gmem.dstates.at[index], smem.dstates),
       *optional(gmem.z, (batch, row), smem.z),
       *optional(gmem.dz, (batch, row), smem.dz),
       *weight_copies(gmem, smem, *place)], smem.own_ready)


def _load_queries(gmem, smem, plan, place, member):
  batch, head, chunk = place
  times = steps(chunk)
  source = head * plan.G + member
  slot = lax.rem(member, jnp.int32(smem.q.shape[0]))
  copies = [(gmem.q.at[batch, times, head_of(
                 gmem.q, source, plan.K * plan.G)], smem.q.at[slot]),
            (gmem.dy.at[batch, times, source], smem.dy.at[slot])]
  if plan.normalize is not None:
    copies.append(
        (gmem.inverse.at[batch, source, times], smem.inverse.at[slot]))
  mosaic_gpu.copy_in(copies, smem.ready.at[slot])


def _make_dq(gmem, smem, plan, place):
  batch, head, chunk = place
  times = steps(chunk)
  summed, decayed = plan.normalize is not None, smem.levels is not None
  scaled = smem.before is not None
  slots, dtype = smem.q.shape[0], smem.q.dtype

  def visit(member, rows):
    slot = lax.rem(member, jnp.int32(slots))
    q, dy = smem.q.at[slot], smem.dy.at[slot]

    def queries_by(x):
      tile = mosaic_gpu.load(q).astype(jnp.float32)
      return jnp.sum(tile * x, axis=1)

    mosaic_gpu.wait(smem.ready.at[slot])
    dp = product(dy, transposed(smem.v))
    if summed:
      s = product(q, transposed(smem.k))
      delta = jnp.sum(weigh(s * dp, met), axis=1)
    dq = product(dy, transposed(smem.states))
    if scaled:
      dq = weigh(dq, by_row(smem.before[...], dq.shape))
    if summed:
      inverse = mosaic_gpu.load(smem.inverse.at[slot], mosaic_gpu.PER_ROW)
      delta = (delta + queries_by(dq)) * inverse
      smem.delta[slot] = delta
      plgpu.commit_smem()
      mosaic_gpu.arrive(smem.delta_ready.at[slot])
      z = by_column(smem.z[pl.ds(0, dq.shape[1])], dq.shape)
      if scaled:
        z = weigh(z, by_row(smem.before[...], dq.shape))
      dq = (dq - by_row(delta, dq.shape) * z) * by_row(inverse, dq.shape)
      dp = (dp - by_row(delta, dp.shape)) * by_row(inverse, dp.shape)
    dq = dq + product(weigh(dp, met).astype(dtype), smem.k)
    if decayed:
      rows += queries_by(dq)
    mosaic_gpu.wait_read()
    smem.dq[...] = dq.astype(smem.dq.dtype)
    mosaic_gpu.copy_out(
        [(smem.dq, gmem.dq.at[batch, times, head * plan.G + member])])
    mosaic_gpu.arrive(smem.free.at[slot])

    @pl.when(member + slots < plan.G)
    def _():
      mosaic_gpu.wait(smem.free.at[slot])
      _load_queries(gmem, smem, plan, place, member + slots)

    return rows

  mosaic_gpu.wait(smem.own_ready)
  met = pairs(smem, later=0)
  rows = (
      mosaic_gpu.filled((CHUNK,), 0.0, mosaic_gpu.PER_ROW) if decayed else ())
  rows = lax.fori_loop(0, plan.G, visit, rows)
  if decayed:
    smem.rows[...] = rows
    mosaic_gpu.copy_out([(smem.rows, gmem.rows.at[batch, head, times])])
  mosaic_gpu.wait_written()


def _make_dk_dv(gmem, smem, plan, place):
  batch, head, chunk = place
  times = steps(chunk)
  summed, decayed = plan.normalize is not None, smem.levels is not None
  slots, dtype = smem.q.shape[0], smem.q.dtype

  def visit(dk, dv, met, member, carry):
    slot = lax.rem(member, jnp.int32(slots))
    q, dy = smem.q.at[slot], smem.dy.at[slot]
    mosaic_gpu.wait(smem.ready.at[slot])
    s = weigh(product(smem.k, transposed(q)), met)
    if summed:
      s = s * by_column(smem.inverse[slot], s.shape)
    plgpu.wgmma(dv, s.astype(dtype), dy)
    dp = product(smem.v, transposed(dy))
    if summed:
      mosaic_gpu.wait(smem.delta_ready.at[slot])
      dp = dp - by_column(smem.delta[slot], dp.shape)
      dp = dp * by_column(smem.inverse[slot], dp.shape)
    plgpu.wgmma(dk, weigh(dp, met).astype(dtype), q)
    plgpu.wgmma_wait(0)
    if summed:
      plgpu.commit_smem()  # Loads come before the next copy too.
    mosaic_gpu.arrive(smem.free.at[slot])
    return carry

  def accumulate(dk, dv):
    lax.fori_loop(
        0, plan.G,
        functools.partial(visit, dk, dv, pairs(smem, later=1)), ())
    return dk[...], dv[...]

  def kept(x):
    if smem.after is None:
      return x
    return weigh(x, by_row(smem.after[...], x.shape))

  def weighed_keys(x):
    k = mosaic_gpu.load(smem.k).astype(jnp.float32)
    return jnp.sum(k * x, axis=1)

  mosaic_gpu.wait(smem.own_ready)
  dk, dv = pl.run_scoped(
      accumulate, plgpu.ACC(smem.k.shape), plgpu.ACC(smem.v.shape))
  # What the state after the chunk asks for, one at a time: registers are few.
  dv = dv + kept(product(smem.k, smem.dstates))
  smem.dv[...] = dv.astype(dtype)
  if decayed:
    smem.columns[...] = weighed_keys(dk)
  carried = product(smem.v, transposed(smem.dstates))
  if summed:
    carried += by_column(
        smem.dz[pl.ds(0, carried.shape[1])], carried.shape)
  carried = kept(carried)
  smem.dk[...] = (dk + carried).astype(smem.dk.dtype)
  copies = [(smem.dk, gmem.dk.at[batch, times, head]),
            (smem.dv, gmem.dv.at[batch, times, head])]
  if decayed:
    smem.ends[...] = weighed_keys(carried)
    copies += [(smem.columns, gmem.columns.at[batch, head, times]),
               (smem.ends, gmem.ends.at[batch, head, times])]
  mosaic_gpu.copy_out(copies)
  mosaic_gpu.wait_written()
