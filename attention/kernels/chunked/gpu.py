"""Chunked linear attention for Hopper GPUs, in Mosaic GPU.

Two passes forward: `gpu_states` walks over the chunks and writes the state
before each one; then every chunk is on its own, a thread block each, which
reads that state. Two passes backward: the same walk in reverse for the gradient
of the state after each chunk, then `gpu_backward`, again every chunk on its
own. A chunk has 64 steps, the rows of a warpgroup's product.

Decays come as vectors of float32, prepared here: sums of logarithms over
exactly the steps that they span, in halves of 1, 2, .. 32 steps, from which a
tile of the decays of all pairs takes one addition (`hopper.pairs`). A step that
starts a document has a log decay of -inf, so that segments cost nothing more.

States are float32 in registers; what the outputs read of them is rounded to the
dtype of the inputs, as every operand of the tensor cores.
"""

import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import chunked, dispatch
from attention.kernels.chunked import gpu_backward, gpu_states, hopper
from attention.kernels.chunked.hopper import CHUNK

_FORGOTTEN = -1e30  # log of a decay to 0: 64 of them can be added up.


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
  dispatch.require_hopper()
  for name in ('q', 'k', 'v'):
    dtype = getattr(operands, name).dtype
    if dtype == jnp.float16:
      raise NotImplementedError(
          f'gpu takes no float16 ({name}): sums over the steps leave its range')
    if dtype != jnp.bfloat16:
      raise NotImplementedError(
          f'gpu takes bfloat16, not {dtype} ({name}), which the tensor cores '
          'would round')
  for name, width in (('H', operands.q.shape[-1]), ('V', operands.v.shape[-1])):
    if width % 16 or not 16 <= width <= 128:
      raise NotImplementedError(
          f'gpu takes {name} that 16 divides, up to 128, not {width}')


class _Weights(NamedTuple):
  """What a chunk weighs its steps with; None where everything weighs 1."""
  levels: jax.Array | None  # [B,K,chunks*LEVELS,CHUNK], see hopper.pairs
  ids: jax.Array | None  # [B,chunks*CHUNK], only without levels
  before: jax.Array | None  # [B,K,chunks,CHUNK], from the state to each step
  after: jax.Array | None  # likewise, from each step to the end of the chunk
  kept: jax.Array | None  # [B,K,chunks], from state to state


def forward(operands, rule):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, z0, starts = operands
  time = q.shape[1]
  plan = _plan(q, k, rule)
  weights = _weights(plan, k, decay, starts)
  q, k, v = map(_pad, (q, k, v))
  scales = None
  if weights.kept is not None:
    sums = () if rule.normalize is None else (weights.after,)
    scales = _scales(weights.after, weights.kept, *sums)
  S = gpu_states.states(plan._replace(G=1), k, v, scales, s0, z0, reverse=False)
  out = _outputs(plan, q, k, v, S['states'], S.get('z_states'), weights)
  y, last = out['y'][:, :time], (S['last'], S.get('z_last'))
  saved = (S['states'], S.get('z_states'))
  if rule.normalize is not None:
    saved += (y, out['inverse'])
  return (y, *last), saved


def backward(operands, rule, saved, cotangents):
  """See `attention.kernels.chunked`."""
  dy, dsT, dzT = cotangents
  q, k, v, decay, _, _, starts = operands
  plan = _plan(q, k, rule)
  weights = _weights(plan, k, decay, starts)
  dy = dy.astype(q.dtype)
  inverse = delta = None
  if rule.normalize is not None:
    inverse = saved[3]
    delta = jnp.sum(dy.astype(jnp.float32) * saved[2].astype(jnp.float32), -1)
    delta = _chunks(plan, jnp.swapaxes(delta, 1, 2)).reshape(inverse.shape)
  series = dict(zip('qkv', map(_pad, (q, k, v)), strict=True), dy=_pad(dy))
  dS = gpu_states.states(
      plan, series['q'], series['dy'],
      _reverse_scales(plan, weights, inverse, delta), dsT, dzT, reverse=True)
  out = gpu_backward.gradients(
      plan,
      dict(series, states=saved[0], dstates=dS['states'], inverse=inverse,
           z=saved[1], dz=dS.get('z_states')),
      dict(levels=weights.levels, ids=weights.ids, before=weights.before,
           after=weights.after))
  ddecay = None
  if decay is not None:
    passed = jnp.sum(saved[0].astype(jnp.float32) * dS['states'], (1, 2))
    passed = passed.reshape(weights.kept.shape)
    if rule.normalize is not None:
      passed += jnp.sum(saved[1] * dS['z_states'], -1).reshape(passed.shape)
    ddecay = _decay_gradient(plan, starts, weights.kept, passed, out)
    ddecay = jnp.swapaxes(ddecay, 1, 2)[:, :q.shape[1]]
  dq, dk, dv = (out[name][:, :q.shape[1]] for name in ('dq', 'dk', 'dv'))
  return chunked.Operands(dq, dk, dv, ddecay, dS['last'], dS.get('z_last'),
                          None)


def _reverse_scales(plan, weights, inverse, delta):
  """What the gradients of the states weigh queries with, see _scales."""
  before, kept = weights.before, weights.kept
  if inverse is None:
    if before is None:
      return None
    scale, more = jnp.repeat(before, plan.G, axis=1), ()
  else:
    scale = _chunks(plan, inverse)
    if before is not None:
      before = jnp.repeat(before, plan.G, axis=1)
      scale = jnp.where(before > 0, before * scale, 0.0)
    delta = _chunks(plan, delta)
    more = (jnp.where(scale != 0, -scale * delta, 0.0),)
  # The first of a group forgets for all.
  every = jnp.ones(scale.shape[:-1])
  if kept is not None:
    every = every.at[:, ::plan.G].set(kept)
  return _scales(scale, every, *more)


def _decay_gradient(plan, starts, kept, passed, sums):
  """[B,K,chunks*CHUNK]: each step's decay is in all spans that it lies in.

  Args:
    plan: hopper.Plan.
    starts: [B,T] or None.
    kept: [B,K,chunks], the decay from state to state.
    passed: [B,K,chunks], its gradient.
    sums: 'rows', 'columns' and 'ends' of gpu_backward.gradients.
  """
  rows, columns, ends = (
      _chunks(plan, sums[name]) for name in ('rows', 'columns', 'ends'))
  step = jnp.arange(CHUNK)
  later, earlier = step >= step[:, None], step < step[:, None]
  first = jnp.zeros((1, 1, 1, CHUNK), bool)
  if starts is not None:
    first = _chunks(plan, starts)[:, None]
    ids = jnp.cumsum(first, axis=-1)
    same = ids[..., None, :] == ids[..., None]
    later, earlier = later & same, earlier & same
  # Spans that end from here on, less those of them that start from here on.
  masked = lambda mask, x: jnp.sum(jnp.where(mask, x[..., None, :], 0.0), -1)
  total = masked(later, rows - columns) + masked(earlier, ends)
  total += jnp.where(kept > 0, kept * passed, 0.0)[..., None]
  return jnp.where(first, 0.0, total).reshape(*kept.shape[:2], -1)


def _plan(q, k, rule):
  return hopper.Plan(
      q.shape[2] // k.shape[2], pl.cdiv(q.shape[1], CHUNK), rule.normalize)


def _pad(x):
  """[B,T,..] to a T that 8 divides: TMA cuts arrays in tiles of 8 rows.

  Longer ends need none: copies run over them and read zeros.
  """
  missing = -x.shape[1] % 8
  return x if not missing else jnp.pad(
      x, ((0, 0), (0, missing), (0, 0), (0, 0)))


def _chunks(plan, x, fill=0):
  """[..,T] to [..,chunks,CHUNK]."""
  missing = plan.chunks * CHUNK - x.shape[-1]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)],
              constant_values=fill)
  return x.reshape(*x.shape[:-1], plan.chunks, CHUNK)


def _weights(plan, k, decay, starts):
  """_Weights of a call."""
  if decay is None and starts is None:
    return _Weights(*(None,) * 5)
  logs = (jnp.zeros((k.shape[0], k.shape[2], k.shape[1])) if decay is None
          else jnp.swapaxes(decay.astype(jnp.float32), 1, 2))
  # The state before is forgotten where a document starts.
  if starts is not None:
    logs = jnp.where(starts[:, None], _FORGOTTEN, logs)
  logs = _chunks(plan, jnp.maximum(logs, _FORGOTTEN))
  levels, before, after = _spans(logs)
  before, after = jnp.exp(before), jnp.exp(after)
  ids = None
  if decay is None:
    levels = None
    ids = jnp.cumsum(_chunks(plan, starts.astype(jnp.int32)), axis=-1)
    ids = ids.reshape(ids.shape[0], -1)
  else:
    levels = (levels * math.log2(math.e)).reshape(*logs.shape[:2], -1, CHUNK)
  return _Weights(levels, ids, before, after, before[..., -1])


def _spans(logs):
  """Sums of [..,CHUNK] over the spans within ever larger blocks.

  Returns:
    [..,LEVELS,CHUNK]: see hopper.pairs; and [..,CHUNK] twice: from the start
    of the chunk to each step, and from after each step to the end.
  """
  levels, until, beyond = [], logs, jnp.zeros_like(logs)
  for level in range(hopper.LEVELS):
    halves = (*logs.shape[:-1], -1, 2, 2 ** level)
    (a, b), (c, d) = (
        jnp.split(x.reshape(halves), 2, axis=-2) for x in (until, beyond))
    join = lambda *parts: jnp.concatenate(parts, -2).reshape(logs.shape)
    levels.append(join(c, b))
    # The last sum of a half is that of all its steps.
    until = join(a, b + a[..., -1:])
    beyond = join(c + b[..., -1:], d)
  return jnp.stack(levels, axis=-2), until, beyond


def _scales(weights, kept, *more):
  """The rows that gpu_states.states takes: weights, kept, more or none."""
  rows = [weights, jnp.broadcast_to(kept[..., None], weights.shape)]
  rows = jnp.stack([*rows, *more], axis=-2)
  return rows.reshape(*rows.shape[:2], -1, CHUNK)


def _outputs(plan, q, k, v, states, z_states, weights):
  """y [B,T,N,V] and, with normalize, inverse [B,N,chunks*CHUNK] of its sums."""
  B, T, N, H = q.shape
  K, V = v.shape[2:]
  tile = lambda *shape: hopper.tile(
      *shape, dtype=q.dtype, cut=math.gcd(H, V))
  vector = plgpu.SMEM((CHUNK,), jnp.float32)
  per_chunk = lambda x: (
      None if x is None else plgpu.SMEM((CHUNK,), x.dtype))
  summed = z_states is not None
  operands = dict(
      q=q, k=k, v=v, states=states, z=z_states, levels=weights.levels,
      ids=weights.ids, before=weights.before)
  outputs = dict(
      y=jax.ShapeDtypeStruct((B, T, N, V), q.dtype),
      inverse=jax.ShapeDtypeStruct(
          (B, N, plan.chunks * CHUNK), jnp.float32) if summed else None)
  own = 3 + sum(x is not None for x in (
      z_states, weights.levels, weights.ids, weights.before))
  buffers = min(plan.G, 2)
  scratch = dict(
      q=tile(buffers, CHUNK, H), k=tile(CHUNK, H), v=tile(CHUNK, V),
      states=tile(H, V), y=tile(CHUNK, V),
      z=(plgpu.SMEM(z_states.shape[-1:], jnp.float32)
         if summed else None),
      inverse=vector if summed else None,
      levels=None if weights.levels is None else plgpu.SMEM(
          (hopper.LEVELS, CHUNK), jnp.float32),
      ids=per_chunk(weights.ids), before=per_chunk(weights.before),
      own_ready=plgpu.Barrier(num_arrivals=own),
      ready=plgpu.Barrier(num_arrivals=1, num_barriers=buffers))
  return hopper.launch(
      _output_kernel, plan, dict(b=B, k=K, chunk=plan.chunks), operands,
      outputs, scratch, name='outputs')


def _output_kernel(plan, refs, buffers):
  gmem, smem = types.SimpleNamespace(**refs), types.SimpleNamespace(**buffers)
  batch, head, chunk = map(lax.axis_index, ('b', 'k', 'chunk'))
  times = pl.ds(chunk * CHUNK, CHUNK)
  summed, scaled = 'z' in refs, 'before' in refs
  slots = smem.q.shape[0]

  def load(member):
    slot = lax.rem(member, jnp.int32(slots))
    hopper.fetch([(gmem.q.at[batch, times, head * plan.G + member],
                   smem.q.at[slot])], smem.ready.at[slot])

  def visit(member, carry):
    slot = lax.rem(member, jnp.int32(slots))
    plgpu.barrier_wait(smem.ready.at[slot])
    q = smem.q.at[slot]
    y = hopper.product(q, smem.states)
    if scaled:
      y = hopper.weigh(y, hopper.by_row(smem.before[...], y.shape))
    s = hopper.product(q, hopper.transposed(smem.k))
    s = hopper.weigh(s, met)
    y = y + hopper.product(s.astype(q.dtype), smem.v)
    if summed:
      tile = plgpu.layout_cast(q[...], hopper.TILE).astype(jnp.float32)
      z = hopper.by_column(smem.z[pl.ds(0, q.shape[-1])], tile.shape)
      total = jnp.sum(tile * z, axis=1)
      if scaled:
        total = hopper.weigh(
            total, plgpu.layout_cast(smem.before[...], hopper.PER_ROW))
      inverse = 1 / (total + jnp.sum(s, axis=1) + plan.normalize)
      y = y * hopper.by_row(inverse, y.shape)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.y[...] = y.astype(q.dtype)
    target = head * plan.G + member
    copies = [(smem.y, gmem.y.at[batch, times, target])]
    if summed:
      smem.inverse[...] = inverse
      copies.append((smem.inverse, gmem.inverse.at[batch, target, times]))
    hopper.store(copies)
    pl.when(member + slots < plan.G)(lambda: load(member + slots))
    return carry

  for member in range(slots):
    load(jnp.int32(member))
  index = head * plan.chunks + chunk
  copies = [(gmem.k.at[batch, times, head], smem.k),
            (gmem.v.at[batch, times, head], smem.v),
            (gmem.states.at[
                batch * pl.num_programs(1) * plan.chunks + index],
             smem.states)]
  if summed:
    copies.append((gmem.z.at[batch, index], smem.z))
  copies += hopper.weight_copies(gmem, smem, batch, head, chunk)
  hopper.fetch(copies, smem.own_ready)
  plgpu.barrier_wait(smem.own_ready)
  met = hopper.pairs(
      getattr(smem, 'levels', None), getattr(smem, 'ids', None), later=0)
  lax.fori_loop(0, plan.G, visit, ())
  plgpu.wait_smem_to_gmem(0)
