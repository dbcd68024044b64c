"""The gradients of a chunk, given the states around it, in Mosaic GPU.

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
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels.chunked import hopper
from attention.kernels.chunked.hopper import CHUNK, by_column, by_row


def gradients(plan, operands, weights):
  """Returns the gradients of q, k and v, and what the decays' are sums of.

  Args:
    plan: hopper.Plan.
    operands: {name: array or None}: q, k, v, dy with T a multiple of 8; states
      and dstates [B*K*chunks,H,V], before and after each chunk; and with a
      normaliser inverse [B,N,chunks*CHUNK], z and dz [B,K*chunks,H].
    weights: {name: array or None}: levels, ids, before, after.

  Returns:
    {'dq', 'dk', 'dv'}, and with levels, in float32 [B,K,chunks*CHUNK], 'rows':
    what the logs of the decays up to each step get, 'columns' and 'ends': those
    from each step on, to the steps of the chunk and to its end.
  """
  q, k, v = (operands[name] for name in 'qkv')
  B, _, N, H = q.shape
  K, V = v.shape[2:]
  summed, decayed = operands['z'] is not None, weights['levels'] is not None
  slots = min(plan.G, 2)
  z_width = operands['z'].shape[-1] if summed else 0
  tile = lambda *shape: hopper.tile(
      *shape, dtype=q.dtype, cut=math.gcd(H, V))
  vector = lambda *shape: plgpu.SMEM(shape, jnp.float32)
  when = lambda condition, x: x if condition else None
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  sums = when(decayed, jax.ShapeDtypeStruct(
      (B, K, plan.chunks * CHUNK), jnp.float32))
  given = lambda name, x: when(weights[name] is not None, x)
  scratch = dict(
      q=tile(slots, CHUNK, H), dy=tile(slots, CHUNK, V), dq=tile(CHUNK, H),
      k=tile(CHUNK, H), v=tile(CHUNK, V),
      dk=tile(CHUNK, H), dv=tile(CHUNK, V),
      states=tile(H, V), dstates=tile(H, V),
      inverse=when(summed, vector(slots, CHUNK)),
      delta=when(summed, vector(slots, CHUNK)),
      z=when(summed, vector(z_width)), dz=when(summed, vector(z_width)),
      levels=given('levels', vector(hopper.LEVELS, CHUNK)),
      ids=given('ids', plgpu.SMEM((CHUNK,), jnp.int32)),
      before=given('before', vector(CHUNK)),
      after=given('after', vector(CHUNK)),
      rows=when(decayed, vector(CHUNK)), columns=when(decayed, vector(CHUNK)),
      ends=when(decayed, vector(CHUNK)),
      own_ready=plgpu.Barrier(num_arrivals=4 + 2 * summed + sum(
          x is not None for x in weights.values())),
      ready=plgpu.Barrier(num_arrivals=2 + summed, num_barriers=slots),
      delta_ready=when(summed, plgpu.Barrier(num_barriers=slots)),
      free=plgpu.Barrier(num_arrivals=2, num_barriers=slots))
  return hopper.launch(
      _kernel, plan, dict(b=B, k=K, chunk=plan.chunks), operands | weights,
      dict(dq=like(q), dk=like(k), dv=like(v), rows=sums, columns=sums,
           ends=sums),
      scratch, name='backward', warpgroups=2)


def _kernel(plan, refs, buffers):
  gmem, smem = types.SimpleNamespace(**refs), types.SimpleNamespace(**buffers)
  place = tuple(map(lax.axis_index, ('b', 'k', 'chunk')))
  role = lax.axis_index('warpgroup')

  @pl.when(role == 0)
  def _():
    for member in range(smem.q.shape[0]):
      _load_queries(plan, gmem, smem, place, jnp.int32(member))
    _load_chunk(plan, gmem, smem, place)
    _make_dq(plan, gmem, smem, place)

  @pl.when(role == 1)
  def _():
    _make_dk_dv(plan, gmem, smem, place)


def _load_chunk(plan, gmem, smem, place):
  batch, head, chunk = place
  times = pl.ds(chunk * CHUNK, CHUNK)
  row = head * plan.chunks + chunk
  index = batch * pl.num_programs(1) * plan.chunks + row
  copies = [(gmem.k.at[batch, times, head], smem.k),
            (gmem.v.at[batch, times, head], smem.v),
            (gmem.states.at[index], smem.states),
            (gmem.dstates.at[index], smem.dstates)]
  if hasattr(gmem, 'z'):
    copies += [(gmem.z.at[batch, row], smem.z),
               (gmem.dz.at[batch, row], smem.dz)]
  hopper.fetch(copies + hopper.weight_copies(gmem, smem, *place),
               smem.own_ready)


def _load_queries(plan, gmem, smem, place, member):
  batch, head, chunk = place
  times = pl.ds(chunk * CHUNK, CHUNK)
  source = head * plan.G + member
  slot = lax.rem(member, jnp.int32(smem.q.shape[0]))
  copies = [(gmem.q.at[batch, times, source], smem.q.at[slot]),
            (gmem.dy.at[batch, times, source], smem.dy.at[slot])]
  if hasattr(gmem, 'z'):
    copies.append(
        (gmem.inverse.at[batch, source, times], smem.inverse.at[slot]))
  hopper.fetch(copies, smem.ready.at[slot])


def _make_dq(plan, gmem, smem, place):
  batch, head, chunk = place
  times = pl.ds(chunk * CHUNK, CHUNK)
  summed, decayed = hasattr(smem, 'z'), hasattr(smem, 'levels')
  scaled = hasattr(smem, 'before')
  slots, dtype = smem.q.shape[0], smem.q.dtype

  def visit(member, rows):
    slot = lax.rem(member, jnp.int32(slots))
    q, dy = smem.q.at[slot], smem.dy.at[slot]

    def queries_by(x):
      tile = plgpu.layout_cast(q[...], hopper.TILE).astype(jnp.float32)
      return jnp.sum(tile * x, axis=1)

    plgpu.barrier_wait(smem.ready.at[slot])
    dp = hopper.product(dy, hopper.transposed(smem.v))
    if summed:
      s = hopper.product(q, hopper.transposed(smem.k))
      delta = jnp.sum(hopper.weigh(s * dp, met), axis=1)
    dq = hopper.product(dy, hopper.transposed(smem.states))
    if scaled:
      dq = hopper.weigh(dq, by_row(smem.before[...], dq.shape))
    if summed:
      inverse = plgpu.layout_cast(smem.inverse[slot], hopper.PER_ROW)
      delta = (delta + queries_by(dq)) * inverse
      smem.delta[slot] = delta
      plgpu.commit_smem()
      plgpu.barrier_arrive(smem.delta_ready.at[slot])
      z = by_column(smem.z[pl.ds(0, dq.shape[1])], dq.shape)
      if scaled:
        z = hopper.weigh(z, by_row(smem.before[...], dq.shape))
      dq = (dq - by_row(delta, dq.shape) * z) * by_row(inverse, dq.shape)
      dp = (dp - by_row(delta, dp.shape)) * by_row(inverse, dp.shape)
    dq = dq + hopper.product(hopper.weigh(dp, met).astype(dtype), smem.k)
    if decayed:
      rows += queries_by(dq)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.dq[...] = dq.astype(dtype)
    hopper.store([(smem.dq, gmem.dq.at[batch, times, head * plan.G + member])])
    plgpu.barrier_arrive(smem.free.at[slot])

    @pl.when(member + slots < plan.G)
    def _():
      plgpu.barrier_wait(smem.free.at[slot])
      _load_queries(plan, gmem, smem, place, member + slots)

    return rows

  plgpu.barrier_wait(smem.own_ready)
  met = _pairs(smem, later=0)
  rows = plgpu.layout_cast(
      jnp.zeros((CHUNK,), jnp.float32), hopper.PER_ROW) if decayed else ()
  rows = lax.fori_loop(0, plan.G, visit, rows)
  if decayed:
    smem.rows[...] = rows
    hopper.store([(smem.rows, gmem.rows.at[batch, head, times])])
  plgpu.wait_smem_to_gmem(0)


def _make_dk_dv(plan, gmem, smem, place):
  batch, head, chunk = place
  times = pl.ds(chunk * CHUNK, CHUNK)
  summed, decayed = hasattr(smem, 'z'), hasattr(smem, 'levels')
  slots, dtype = smem.q.shape[0], smem.q.dtype

  def visit(dk, dv, met, member, carry):
    slot = lax.rem(member, jnp.int32(slots))
    q, dy = smem.q.at[slot], smem.dy.at[slot]
    plgpu.barrier_wait(smem.ready.at[slot])
    s = hopper.weigh(hopper.product(smem.k, hopper.transposed(q)), met)
    if summed:
      s = s * by_column(smem.inverse[slot], s.shape)
    plgpu.wgmma(dv, s.astype(dtype), dy)
    dp = hopper.product(smem.v, hopper.transposed(dy))
    if summed:
      plgpu.barrier_wait(smem.delta_ready.at[slot])
      dp = dp - by_column(smem.delta[slot], dp.shape)
      dp = dp * by_column(smem.inverse[slot], dp.shape)
    plgpu.wgmma(dk, hopper.weigh(dp, met).astype(dtype), q)
    plgpu.wgmma_wait(0)
    if summed:
      plgpu.commit_smem()  # Loads come before the next copy too.
    plgpu.barrier_arrive(smem.free.at[slot])
    return carry

  def accumulate(dk, dv):
    lax.fori_loop(
        0, plan.G,
        functools.partial(visit, dk, dv, _pairs(smem, later=1)), ())
    return dk[...], dv[...]

  def kept(x):
    if not hasattr(smem, 'after'):
      return x
    return hopper.weigh(x, by_row(smem.after[...], x.shape))

  def weighed_keys(x):
    k = plgpu.layout_cast(smem.k[...], hopper.TILE).astype(jnp.float32)
    return jnp.sum(k * x, axis=1)

  plgpu.barrier_wait(smem.own_ready)
  dk, dv = pl.run_scoped(
      accumulate, plgpu.ACC(smem.k.shape), plgpu.ACC(smem.v.shape))
  # What the state after the chunk asks for, one at a time: registers are few.
  dv = dv + kept(hopper.product(smem.k, smem.dstates))
  smem.dv[...] = dv.astype(dtype)
  if decayed:
    smem.columns[...] = weighed_keys(dk)
  carried = hopper.product(smem.v, hopper.transposed(smem.dstates))
  if summed:
    carried += by_column(
        smem.dz[pl.ds(0, carried.shape[1])], carried.shape)
  carried = kept(carried)
  smem.dk[...] = (dk + carried).astype(dtype)
  copies = [(smem.dk, gmem.dk.at[batch, times, head]),
            (smem.dv, gmem.dv.at[batch, times, head])]
  if decayed:
    smem.ends[...] = weighed_keys(carried)
    copies += [(smem.columns, gmem.columns.at[batch, head, times]),
               (smem.ends, gmem.ends.at[batch, head, times])]
  hopper.store(copies)
  plgpu.wait_smem_to_gmem(0)


def _pairs(smem, later):
  return hopper.pairs(
      getattr(smem, 'levels', None), getattr(smem, 'ids', None), later=later)
