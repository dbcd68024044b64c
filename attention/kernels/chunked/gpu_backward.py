"""The gradients of a chunk, given the states around it, in Mosaic GPU.

With d_t s the decay from step s to t, b_t that from the state before the chunk,
e_s that to its end, and r_t one over the normaliser (or 1):

  p_ts = d_ts r_t (dy_t v_s - delta_t)
  dq_t = sum_s p_ts k_s + b_t r_t (S dy_t - delta_t z)
  dk_s = sum_t p_ts q_t + e_s (dS v_s + dz)
  dv_s = sum_t d_ts r_t (q_t k_s) dy_t + e_s dS^T k_s

One warpgroup of a thread block has rows of queries and makes dq, the other one
has rows of keys and makes dk and dv, summed over the group in its order: each
computes the tiles of pairs its own way round, and no tile is passed between
them.
"""

import functools
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
      normaliser inverse and delta [B,N,chunks*CHUNK], z and dz [B,K*chunks,H].
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
  tile = lambda *shape: hopper.tile(*shape, dtype=q.dtype)
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
      z=when(summed, vector(H)), dz=when(summed, vector(H)),
      levels=given('levels', vector(hopper.LEVELS, CHUNK)),
      ids=given('ids', plgpu.SMEM((CHUNK,), jnp.int32)),
      before=given('before', vector(CHUNK)),
      after=given('after', vector(CHUNK)),
      rows=when(decayed, vector(CHUNK)), columns=when(decayed, vector(CHUNK)),
      ends=when(decayed, vector(CHUNK)),
      own_ready=plgpu.Barrier(num_arrivals=4 + 2 * summed + sum(
          x is not None for x in weights.values())),
      ready=plgpu.Barrier(num_arrivals=2 + 2 * summed, num_barriers=slots),
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
    copies += [(gmem.inverse.at[batch, source, times], smem.inverse.at[slot]),
               (gmem.delta.at[batch, source, times], smem.delta.at[slot])]
  hopper.fetch(copies, smem.ready.at[slot])


def _make_dq(plan, gmem, smem, place):
  batch, head, chunk = place
  times = pl.ds(chunk * CHUNK, CHUNK)
  summed, decayed = hasattr(smem, 'z'), hasattr(smem, 'levels')
  slots, dtype = smem.q.shape[0], smem.q.dtype

  def normalized(x, slot, per_column):
    if not summed:
      return x
    x = x - by_row(smem.delta[slot], x.shape) * per_column()
    return x * by_row(smem.inverse[slot], x.shape)

  def visit(member, rows):
    slot = lax.rem(member, jnp.int32(slots))
    plgpu.barrier_wait(smem.ready.at[slot])
    dp = hopper.product(smem.dy.at[slot], hopper.transposed(smem.v))
    dp = hopper.weigh(normalized(dp, slot, lambda: 1.0), met)
    carried = hopper.product(smem.dy.at[slot], hopper.transposed(smem.states))
    carried = normalized(
        carried, slot, lambda: by_column(smem.z[...], carried.shape))
    if hasattr(smem, 'before'):
      carried = hopper.weigh(
          carried, by_row(smem.before[...], carried.shape))
    if decayed:
      s = hopper.product(smem.q.at[slot], hopper.transposed(smem.k))
      tile = plgpu.layout_cast(
          smem.q[slot], hopper.TILE).astype(jnp.float32)
      rows += (jnp.sum(hopper.weigh(s, dp), axis=1)
               + jnp.sum(hopper.weigh(tile, carried), axis=1))
    dq = carried + hopper.product(dp.astype(dtype), smem.k)
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

  def visit(dk, dv, met, member, columns):
    slot = lax.rem(member, jnp.int32(slots))
    q, dy = smem.q.at[slot], smem.dy.at[slot]
    plgpu.barrier_wait(smem.ready.at[slot])
    s = hopper.weigh(hopper.product(smem.k, hopper.transposed(q)), met)
    dp = hopper.product(smem.v, hopper.transposed(dy))
    if summed:
      dp = dp - by_column(smem.delta[slot], dp.shape)
      inverse = by_column(smem.inverse[slot], dp.shape)
      dp = dp * inverse
    if decayed:
      columns += jnp.sum(hopper.weigh(dp, s), axis=1)
    s = s * inverse if summed else s
    plgpu.wgmma(dv, s.astype(dtype), dy)
    plgpu.wgmma(dk, hopper.weigh(dp, met).astype(dtype), q)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(smem.free.at[slot])
    return columns

  def accumulate(dk, dv):
    columns = plgpu.layout_cast(
        jnp.zeros((CHUNK,), jnp.float32), hopper.PER_ROW) if decayed else ()
    columns = lax.fori_loop(
        0, plan.G,
        functools.partial(visit, dk, dv, _pairs(smem, later=1)), columns)
    return dk[...], dv[...], columns

  plgpu.barrier_wait(smem.own_ready)
  dk, dv, columns = pl.run_scoped(
      accumulate, plgpu.ACC(smem.k.shape), plgpu.ACC(smem.v.shape))
  # What the state after the chunk asks of it.
  carried_v = hopper.product(smem.k, smem.dstates)
  carried_k = hopper.product(smem.v, hopper.transposed(smem.dstates))
  if summed:
    carried_k += by_column(smem.dz[...], carried_k.shape)
  if hasattr(smem, 'after'):
    carried_k = hopper.weigh(
        carried_k, by_row(smem.after[...], carried_k.shape))
    carried_v = hopper.weigh(
        carried_v, by_row(smem.after[...], carried_v.shape))
  copies = [(smem.dk, gmem.dk.at[batch, times, head]),
            (smem.dv, gmem.dv.at[batch, times, head])]
  if decayed:
    tile = plgpu.layout_cast(smem.k[...], hopper.TILE).astype(jnp.float32)
    smem.ends[...] = jnp.sum(hopper.weigh(tile, carried_k), axis=1)
    smem.columns[...] = columns
    copies += [(smem.columns, gmem.columns.at[batch, head, times]),
               (smem.ends, gmem.ends.at[batch, head, times])]
  smem.dk[...] = (dk + carried_k).astype(dtype)
  smem.dv[...] = (dv + carried_v).astype(dtype)
  hopper.store(copies)
  plgpu.wait_smem_to_gmem(0)


def _pairs(smem, later):
  return hopper.pairs(
      getattr(smem, 'levels', None), getattr(smem, 'ids', None), later=later)
