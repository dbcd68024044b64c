"""Flash attention for Hopper GPUs, in Mosaic GPU: three kernels.

`_forward_kernel` and `_dq_kernel` give a block of queries to each thread block
and walk over the keys that it sees; `_dkv_kernel` gives it a block of keys and
walks over the queries of the whole group, so that every output is written once,
in a fixed order, without atomics. Each thread block has two warpgroups that
compute, 64 rows each, and one that only starts the TMA copies into a ring of
shared memory buffers which both read.

Which blocks are walked is decided before the kernel, in a few integers per
thread block (`hopper.Span`): blocks that the mask empties are never loaded,
blocks that it leaves whole take a loop without masks. Copies may run over the
ends of the arrays: TMA reads zeros there and drops what is written.

Scores live in units of log 2, because the hardware's exponential is 2^x. The
wgmma instructions exist on compute capability 9.0 alone.
"""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib import cuda_versions
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import dispatch
from attention.kernels.flash import gpu_backward, hopper

# Below every score, and finite: where nothing was seen yet, -inf less this is
# still -inf, and its exponential 0.
_FLOOR = -3e38


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  q, _, v, *_ = operands
  dispatch.require_hopper()
  if rule.causal and jax.default_backend() == 'gpu':
    runtime = cuda_versions.cuda_runtime_get_version() if cuda_versions else 0
    # jax's own Mosaic GPU attention refuses these too: ptxas miscompiles it.
    if 12080 <= runtime < 12091:
      raise NotImplementedError(
          f'gpu needs CUDA 12.9.1 for causal masks, not {runtime}: '
          'CUDA 12.8 and 12.9.0 miscompile them')
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
        f'gpu takes bfloat16 and float16, not {q.dtype}, which the tensor '
        'cores would round')
  for name, width in (('H', q.shape[-1]), ('V', v.shape[-1])):
    if width % 16 or not 16 <= width <= 256:
      raise NotImplementedError(
          f'gpu takes {name} that 16 divides, up to 256, not {width}')
  if not rule.scale > 0:
    raise NotImplementedError(f'gpu takes a positive scale, not {rule.scale}')


def forward(operands, rule):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  q, k, v, *_ = operands
  B, T, N, H = q.shape
  S, K, V = v.shape[1:]
  # 64 registers hold a [64, 128] tile; wider heads need them for the sums.
  block = 128 if max(H, V) <= 128 else 64
  plan = hopper.Plan(
      rule, operands.q_ids is not None, S, N // K, block, stages=2)
  ids, spans = hopper.query_spans(plan, operands)
  scratch = dict(
      q=hopper.own_tile(H, q.dtype),
      k=hopper.ring_tile(plan, H, q.dtype),
      v=hopper.ring_tile(plan, V, q.dtype),
      lse=hopper.own_vector(jnp.float32),
      own_ready=hopper.barrier(1 + plan.segments, hopper.WARPGROUPS),
      k_ready=hopper.barrier(1 + plan.segments, plan.stages),
      v_ready=hopper.barrier(1, plan.stages),
      k_free=hopper.barrier(hopper.WARPGROUPS, plan.stages),
      v_free=hopper.barrier(hopper.WARPGROUPS, plan.stages),
      turn=hopper.barrier(hopper.WARPGROUPS, 1), **hopper.id_buffers(plan))
  if V != H:
    scratch['out'] = hopper.own_tile(V, q.dtype)
  tiles = pl.cdiv(T, hopper.HEIGHT)
  q, k, v = map(hopper.pad_length, (q, k, v))
  out, lse = hopper.launch(
      _forward_kernel, plan, (B, N, tiles),
      [jax.ShapeDtypeStruct((B, q.shape[1], N, V), q.dtype),
       jax.ShapeDtypeStruct((B, N, tiles * hopper.HEIGHT), jnp.float32)],
      scratch, name='forward')(q, k, v, *ids, spans)
  return out[:, :T], lse[..., :T]


def _forward_kernel(plan, q, k, v, /, *refs, **scratch):
  *ids, spans, out, lse = refs
  smem = types.SimpleNamespace(**scratch)
  span, batch, head, kv_head, tile, warpgroup = hopper.query_tile(plan, spans)

  def sources(block, head):
    del head
    keys = pl.ds(block * plan.block, plan.block)
    return [
        (smem.k_free, smem.k_ready,
         [(k.at[batch, keys, kv_head], smem.k)]
         + [(x.at[batch, keys], smem.ring_ids) for x in ids[1:]]),
        (smem.v_free, smem.v_ready,
         [(v.at[batch, keys, kv_head], smem.v)])]

  def copy():
    hopper.feed(plan, span, 1, sources)

  def compute():
    row = tile * hopper.HEIGHT + warpgroup * hopper.ROWS
    rows = pl.ds(row, hopper.ROWS)
    hopper.fetch(
        [(q.at[batch, rows, head], smem.q)]
        + [(x.at[batch, rows], smem.own_ids) for x in ids[:1]],
        warpgroup, smem.own_ready)
    sums, top, total = _attend(
        plan, smem, span, warpgroup, row + span.offset, v.shape[-1])
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    smem.lse[warpgroup] = jnp.where(
        seen, top / hopper.LOG2E + jnp.log(safe), -jnp.inf)
    staged = scratch.get('out', smem.q).at[warpgroup]
    first = 0
    for part in sums:
      width = part.shape[1]
      staged[:, pl.ds(first, width)] = (
          part * hopper.by_row(1 / safe, part.shape)).astype(q.dtype)
      first += width
    hopper.store([(staged, out.at[batch, rows, head]),
                  (smem.lse.at[warpgroup], lse.at[batch, head, rows])])

  hopper.divide_work(warpgroup, copy, compute, registers=(40, 232))


def _attend(plan, smem, span, warpgroup, position, V):
  """Unnormalised outputs in parts [64, <= 128], row maxima, row sums."""
  part = 128 if V <= 128 else 64
  starts = range(0, V, part)

  def take_turns():
    # One warpgroup's products run during the other one's exponentials.
    plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.turn)

  def scores(slot, acc):
    plgpu.wgmma(
        acc, smem.q.at[warpgroup], smem.k.at[slot].transpose((1, 0)))
    take_turns()
    return acc[...]

  def weigh(p, slot, start, acc):
    plgpu.wgmma(acc, p, smem.v.at[slot, :, pl.ds(start, acc.shape[1])])
    return acc[...]

  def visit(step, block, head, masked, carry):
    del head
    sums, top, total = carry
    slot = lax.rem(step, plan.stages)
    plgpu.barrier_wait(smem.k_ready.at[slot])
    s = pl.run_scoped(functools.partial(scores, slot),
                      plgpu.ACC((hopper.ROWS, plan.block)))
    s, unit, _ = hopper.cap(plan, s)
    if masked:
      seen = hopper.visible(plan, position, block * plan.block, s.shape,
                            hopper.load_ids(plan, smem, warpgroup, slot))
      s = jnp.where(seen, s, -jnp.inf)
    hopper.release(smem.k_free, slot, was_read=masked and plan.segments)
    new_top = jnp.maximum(top, jnp.max(s, axis=1) * unit)
    p = jnp.exp2(s * unit - hopper.by_row(new_top, s.shape))
    kept = jnp.exp2(top - new_top)
    total = total * kept + jnp.sum(p, axis=1)
    p = p.astype(smem.v.dtype)
    plgpu.barrier_wait(smem.v_ready.at[slot])
    take_turns()
    # Products into fresh accumulators: the addition rides on the rescaling.
    sums = tuple(
        old * hopper.by_row(kept, old.shape) + pl.run_scoped(
            functools.partial(weigh, p, slot, start), plgpu.ACC(old.shape))
        for start, old in zip(starts, sums))
    hopper.release(smem.v_free, slot, was_read=False)
    return sums, new_top, total

  sums = tuple(
      hopper.filled((hopper.ROWS, min(part, V - start)), 0, hopper.TILE)
      for start in starts)
  pl.when(warpgroup == 1)(take_turns)
  top = hopper.filled((hopper.ROWS,), _FLOOR, hopper.PER_ROW)
  total = hopper.filled((hopper.ROWS,), 0, hopper.PER_ROW)
  carry = hopper.walk(span, 1, visit, (sums, top, total))
  pl.when(warpgroup == 0)(take_turns)
  return carry


def backward(operands, rule, saved, dout):
  """Returns the gradients of q, k and v; see the package."""
  (q, k, v, *_), (lse, delta) = operands, saved
  T, H = q.shape[1], q.shape[-1]
  S, V = v.shape[1], v.shape[-1]
  plan = hopper.Plan(
      rule, operands.q_ids is not None, S, q.shape[2] // k.shape[2], block=64,
      # Two stages take 512 bytes of shared memory for each lane of H and V.
      stages=2 if H + V <= 432 else 1)
  # Rows past the end have q = dout = 0: with lse = delta = 0 they add nothing.
  tail = ((0, 0), (0, 0), (0, -T % hopper.HEIGHT))
  arrays = (*map(hopper.pad_length, (q, k, v, dout.astype(q.dtype))),
            jnp.pad(lse * hopper.LOG2E, tail), jnp.pad(delta, tail))
  dq = gpu_backward.dq(plan, arrays, operands)
  # Beside the scores, 240 registers do not hold two sums of wider heads.
  parts = [('dk', 'dv')] if max(H, V) <= 128 else [('dk',), ('dv',)]
  gradients = [x[:, :S] for names in parts for x in gpu_backward.dkv(
      plan, names, arrays, operands)]
  return dq[:, :T], *gradients
