"""The backward kernels of gpu.py: dq over keys, dk and dv over queries."""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels.flash import hopper


def dq(plan, arrays, operands):
  """Returns dq [B,T,N,H].

  Args:
    plan: hopper.Plan.
    arrays: q, k, v, dout, and lse (in log 2) and delta padded to whole tiles.
    operands: as the op has them, for ids and offset.
  """
  q, _, v = arrays[:3]
  B, T, N, H = q.shape
  V = v.shape[-1]
  ids, spans = hopper.query_spans(plan, operands)
  scratch = dict(
      q=hopper.own_tile(H, q.dtype),
      dout=hopper.own_tile(V, q.dtype),
      lse=hopper.own_vector(jnp.float32),
      delta=hopper.own_vector(jnp.float32),
      k=hopper.ring_tile(plan, H, q.dtype),
      v=hopper.ring_tile(plan, V, q.dtype),
      own_ready=hopper.barrier(4 + plan.segments, hopper.WARPGROUPS),
      ready=hopper.barrier(2 + plan.segments, plan.stages),
      free=hopper.barrier(hopper.WARPGROUPS, plan.stages),
      **hopper.id_buffers(plan))
  return hopper.launch(
      _dq_kernel, plan, (B, N, pl.cdiv(T, hopper.HEIGHT)),
      jax.ShapeDtypeStruct(q.shape, q.dtype), scratch, name='dq')(
          *arrays, *ids, spans)


def _dq_kernel(plan, q, k, v, dout, lse, delta, /, *refs, **scratch):
  *ids, spans, dq = refs
  smem = types.SimpleNamespace(**scratch)
  span, batch, head, kv_head, tile, warpgroup = hopper.query_tile(plan, spans)

  def sources(block, head):
    del head
    keys = pl.ds(block * plan.block, plan.block)
    return [(smem.free, smem.ready,
             [(k.at[batch, keys, kv_head], smem.k),
              (v.at[batch, keys, kv_head], smem.v)]
             + [(x.at[batch, keys], smem.ring_ids) for x in ids[1:]])]

  def copy():
    hopper.feed(plan, span, 1, sources)

  def compute():
    row = tile * hopper.HEIGHT + warpgroup * hopper.ROWS
    rows = pl.ds(row, hopper.ROWS)
    hopper.fetch(
        [(q.at[batch, rows, head], smem.q),
         (dout.at[batch, rows, head], smem.dout),
         (lse.at[batch, head, rows], smem.lse),
         (delta.at[batch, head, rows], smem.delta)]
        + [(x.at[batch, rows], smem.own_ids) for x in ids[:1]],
        warpgroup, smem.own_ready)
    own_lse = plgpu.layout_cast(smem.lse[warpgroup], hopper.PER_ROW)
    own_delta = plgpu.layout_cast(smem.delta[warpgroup], hopper.PER_ROW)

    def visit(acc, step, block, head, masked, carry):
      del head
      slot = lax.rem(step, plan.stages)
      plgpu.barrier_wait(smem.ready.at[slot])
      s, dp = hopper.products((smem.q.at[warpgroup], smem.k.at[slot]),
                              (smem.dout.at[warpgroup], smem.v.at[slot]))
      s, unit, slope = hopper.cap(plan, s)
      p = jnp.exp2(s * unit - hopper.by_row(own_lse, s.shape))
      if masked:
        seen = hopper.visible(
            plan, row + span.offset, block * plan.block, s.shape,
            hopper.load_ids(plan, smem, warpgroup, slot))
        p = jnp.where(seen, p, 0.0)
      ds = p * (dp - hopper.by_row(own_delta, s.shape))
      ds = ds if slope is None else ds * slope
      plgpu.wgmma(acc, ds.astype(q.dtype), smem.k.at[slot])
      plgpu.wgmma_wait(0)
      hopper.release(smem.free, slot, was_read=masked and plan.segments)
      return carry

    def accumulate(acc):
      hopper.walk(span, 1, functools.partial(visit, acc), ())
      return acc[...]

    sums = pl.run_scoped(accumulate, plgpu.ACC((hopper.ROWS, q.shape[-1])))
    smem.q[warpgroup] = (sums * plan.rule.scale).astype(q.dtype)
    hopper.store([(smem.q.at[warpgroup], dq.at[batch, rows, head])])

  hopper.divide_work(warpgroup, copy, compute, registers=(24, 240))


def dkv(plan, names, arrays, operands):
  """Returns those of dk [B,S,K,H] and dv [B,S,K,V] that names lists; see dq."""
  q, k, v = arrays[:3]
  B, T, _, H = q.shape
  K, V = v.shape[2:]
  ids = hopper.pad_ids(operands, plan.block, hopper.HEIGHT)
  masks = hopper.block_masks(plan, operands, plan.block, hopper.HEIGHT, ids)
  spans = hopper.make_spans(
      *(jnp.swapaxes(x, 1, 2) for x in masks), operands.q_offset)
  scratch = dict(
      k=hopper.own_tile(H, q.dtype),
      v=hopper.own_tile(V, q.dtype),
      q=hopper.ring_tile(plan, H, q.dtype),
      dout=hopper.ring_tile(plan, V, q.dtype),
      lse=hopper.ring_vector(plan, jnp.float32),
      delta=hopper.ring_vector(plan, jnp.float32),
      own_ready=hopper.barrier(2 + plan.segments, hopper.WARPGROUPS),
      positions=hopper.ring_vector(plan, jnp.int32),
      ready=hopper.barrier(5 + plan.segments, plan.stages),
      free=hopper.barrier(hopper.WARPGROUPS, plan.stages),
      **hopper.id_buffers(plan))
  positions = jnp.arange(arrays[4].shape[-1], dtype=jnp.int32)
  positions += operands.q_offset
  like = dict(dk=k, dv=v)
  return hopper.launch(
      functools.partial(_dkv_kernel, names), plan,
      (B, K, pl.cdiv(plan.S, hopper.HEIGHT)),
      [jax.ShapeDtypeStruct(like[x].shape, q.dtype) for x in names],
      scratch, name='_'.join(names))(
          *arrays, positions, *ids[::-1], spans)


def _dkv_kernel(names, plan, q, k, v, dout, lse, delta, /, *refs, **scratch):
  outputs = refs[len(refs) - len(names):]
  positions, *ids, spans = refs[:len(refs) - len(names)]
  smem = types.SimpleNamespace(**scratch)
  batch, kv_head, tile, warpgroup = hopper.coordinates()
  span = hopper.read_span(spans, batch, tile)

  def sources(block, head):
    queries = pl.ds(block * plan.block, plan.block)
    head += kv_head * plan.G
    return [(smem.free, smem.ready,
             [(q.at[batch, queries, head], smem.q),
              (dout.at[batch, queries, head], smem.dout),
              (lse.at[batch, head, queries], smem.lse),
              (delta.at[batch, head, queries], smem.delta),
              (positions.at[queries], smem.positions)]
             + [(x.at[batch, queries], smem.ring_ids) for x in ids[1:]])]

  def copy():
    hopper.feed(plan, span, plan.G, sources)

  def compute():
    row = tile * hopper.HEIGHT + warpgroup * hopper.ROWS
    rows = pl.ds(row, hopper.ROWS)
    hopper.fetch(
        [(k.at[batch, rows, kv_head], smem.k),
         (v.at[batch, rows, kv_head], smem.v)]
        + [(x.at[batch, rows], smem.own_ids) for x in ids[:1]],
        warpgroup, smem.own_ready)

    def accumulate(*accs):
      visit = functools.partial(
          _visit_queries, plan, smem, warpgroup, row, dict(zip(names, accs)))
      hopper.walk(span, plan.G, visit, ())
      return [acc[...] for acc in accs]

    staged = dict(dk=smem.k, dv=smem.v)
    sums = pl.run_scoped(accumulate, *(
        plgpu.ACC((hopper.ROWS, staged[x].shape[-1])) for x in names))
    for name, total in zip(names, sums):
      total = total * plan.rule.scale if name == 'dk' else total
      staged[name][warpgroup] = total.astype(q.dtype)
    hopper.store([
        (staged[name].at[warpgroup], output.at[batch, rows, kv_head])
        for name, output in zip(names, outputs)])

  hopper.divide_work(warpgroup, copy, compute, registers=(24, 240))


def _visit_queries(plan, smem, warpgroup, row, accs, step, block, head, masked,
                   carry):
  """Adds a block of queries to dk and dv, the sums in accs."""
  # Which block it is comes with it, as positions: counters that are live in
  # the loop would not fit in its registers.
  del block, head
  slot = lax.rem(step, plan.stages)
  plgpu.barrier_wait(smem.ready.at[slot])
  # Transposed: keys are rows, so that p and ds are left operands. With 128
  # registers in the sums, s must be gone before dp comes.
  s, = hopper.products((smem.k.at[warpgroup], smem.q.at[slot]))
  s, unit, slope = hopper.cap(plan, s)
  p = jnp.exp2(s * unit - hopper.by_column(smem.lse, slot, s.shape))
  if masked and (plan.rule.causal or plan.segments):
    seen = hopper.visible_transposed(
        plan, row, hopper.by_column(smem.positions, slot, s.shape),
        hopper.load_ids(plan, smem, warpgroup, slot))
    p = jnp.where(seen, p, 0.0)
  rounded = p.astype(smem.q.dtype)
  # Here, not below: the slope would be kept across a product.
  p = p if slope is None else p * slope
  if 'dv' in accs:
    plgpu.wgmma(accs['dv'], rounded, smem.dout.at[slot])
  if 'dk' in accs:
    dp, = hopper.products((smem.v.at[warpgroup], smem.dout.at[slot]))
    ds = p * (dp - hopper.by_column(smem.delta, slot, s.shape))
    plgpu.wgmma(accs['dk'], ds.astype(smem.q.dtype), smem.q.at[slot])
  plgpu.wgmma_wait(0)
  hopper.release(smem.free, slot, was_read=True)
  return carry
