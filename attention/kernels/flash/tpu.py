"""Flash attention for TPU, forward and backward, in Pallas (Mosaic TPU).

Scores are held transposed, [keys, queries]. The softmax then reduces over
sublanes, which the vector unit does by itself, and the running maximum and sum
of a query block are single rows; [queries, keys] would send each block through
the cross-lane unit twice. The value product is v^T p, so that narrow values
(V = 64) cost half of wide ones instead of the same. Only v (forward) and k
(backward) are turned over, once a block, and out and dq, once a query block.

A grid step is one visit: a block of queries against a block of keys, from the
list made by `tpu_blocks.visits`. What the mask empties is not in the list.
Blocks that it leaves whole run a body without a mask, the blocks on the
diagonal one without the tiles above the diagonal.

The backward kernel makes dq, dk and dv of a visit at once, from one
recomputation of p. dq is complete when its query block is left; dk and dv are
added up in VMEM, for all keys and over the query heads of the group, and
written once.

Online softmax: https://arxiv.org/abs/1805.02867; backward:
https://arxiv.org/abs/2205.14135. Logarithms are to base 2, as in the hardware.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels.flash import tpu_blocks, tpu_launch
from attention.kernels.flash.tpu_blocks import EMPTY, PARTIAL, TRIANGLE
from attention.kernels.tpu_tiles import NN, NT, dot, padded_width, round_up

_LOG2E = math.log2(math.e)
_LOWEST = float(np.finfo(np.float32).min)

# Rows of ones under v^T, whose products with p are its sums: a packed tile.
_ONES = 16



def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  q, k, v, q_ids, _, q_offset = operands
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
        f'q of dtype {q.dtype}: the TPU kernels take bfloat16 and float32')
  B, T, _, H = q.shape
  S, V = k.shape[1], v.shape[3]
  if max(H, V) > 256:
    raise NotImplementedError(
        f'H ({H}) and V ({V}): the TPU kernels take widths up to 256')
  for backward in (False, True):
    blocks = tpu_blocks.block_sizes(
        T, S, widest=max(H, V), itemsize=q.dtype.itemsize, backward=backward,
        window=rule.window, packed=q_ids is not None)
    if max(pl.cdiv(T, blocks.q), pl.cdiv(S, blocks.k)) > tpu_blocks.MAX_BLOCKS:
      raise NotImplementedError(
          f'T ({T}) and S ({S}): the TPU kernels take up to '
          f'{tpu_blocks.MAX_BLOCKS} blocks of {blocks.q}: shard the sequence')
    rows, *_ = tpu_blocks.candidates(
        blocks, T, S, q_offset, causal=rule.causal, window=rule.window)
    listed = rows.size * (B if q_ids is not None else 1)
    if listed > tpu_blocks.MAX_VISITS:
      raise NotImplementedError(
          f'batch {B}, T ({T}) and S ({S}) make a list of {listed} blocks, '
          f'scalar memory holds {tpu_blocks.MAX_VISITS}: shard the batch or '
          'the sequence')


def forward(operands, rule):
  """Returns out [B,T,N,V] and lse [B,N,T]; see the package."""
  q, k, v, *_ = operands
  call = tpu_launch.Launch(operands, rule, backward=False)
  queries, V = call.blocks.q, padded_width(v.shape[-1])
  row = pltpu.VMEM((1, queries), jnp.float32)
  out, lse = call.run(
      _forward_kernel,
      [call.queries(q), call.keys(k), call.keys(v)],
      [call.out_queries(V, q.dtype), call.out_rows()],
      [row, row, pltpu.VMEM((V, queries), jnp.float32)],
      name='flash_forward', products=q.shape[3] + v.shape[3])
  return call.restore(out, v.shape[3]), call.restore(lse, None)


def backward(operands, rule, saved, dout):
  """Returns the gradients of q, k and v; see the package."""
  q, k, v, _, kv_ids, q_offset = operands
  S, most = k.shape[1], _most_keys(k, v)
  if most >= S:
    return _gradients(operands, rule, saved, dout, dq_dtype=q.dtype)
  # dk and dv of all keys do not fit in VMEM: some keys at a time, each with
  # its own dq.
  parts = []
  for start in range(0, S, most):
    part = slice(start, start + most)
    parts.append(_gradients(operands._replace(
        k=k[:, part], v=v[:, part],
        kv_ids=None if kv_ids is None else kv_ids[:, part],
        q_offset=q_offset - start), rule, saved, dout, dq_dtype=jnp.float32))
  dq, dk, dv = zip(*parts)
  return (sum(dq).astype(q.dtype), jnp.concatenate(dk, 1),
          jnp.concatenate(dv, 1))


def _gradients(operands, rule, saved, dout, *, dq_dtype):
  """Returns dq, dk and dv for as many keys as fit in VMEM."""
  (q, k, v, *_), (lse, delta) = operands, saved
  call = tpu_launch.Launch(operands, rule, backward=True)
  H, V = padded_width(k.shape[-1]), padded_width(v.shape[-1])
  dq, dk, dv = call.run(
      _backward_kernel,
      [call.queries(q), call.keys(k), call.keys(v), call.queries(dout),
       call.rows(lse * _LOG2E, delta)],
      [call.out_queries(H, dq_dtype), call.out_keys(H, k.dtype),
       call.out_keys(V, v.dtype)],
      [pltpu.VMEM((H, call.blocks.q), jnp.float32),
       pltpu.VMEM((call.n_keys, H), jnp.float32),
       pltpu.VMEM((call.n_keys, V), jnp.float32)],
      name='flash_backward', products=3 * q.shape[3] + 2 * v.shape[3])
  dk, dv = (jnp.swapaxes(x, 1, 2)[:, :k.shape[1], :, :y.shape[3]]
            for x, y in ((dk, k), (dv, v)))
  return call.restore(dq, q.shape[3]), dk, dv


def _most_keys(k, v):
  """Keys whose dk and dv take a third of VMEM: sums and two output buffers."""
  lanes = sum(round_up(x.shape[-1], 128) for x in (k, v))
  bytes_a_key = lanes * (4 + 2 * k.dtype.itemsize)
  return max(tpu_blocks.vmem_bytes() // 3 // bytes_a_key // 512, 1) * 512


def _scores(spec, keys, queries):
  """Scores [keys, queries] times log2(e), and their slope under the softcap."""
  s = dot(keys, queries, NT)
  if not spec.rule.softcap:
    return s * (spec.rule.scale * _LOG2E), None
  bounded = jnp.tanh(s * (spec.rule.scale / spec.rule.softcap))
  return bounded * (spec.rule.softcap * _LOG2E), 1 - bounded * bounded


def _known_top(spec):
  """A maximum in log 2 that need not be looked for, or None.

  Under a softcap of up to 50, every exponential against this one is between
  2^-116 and 2^30, and so are float32's sums of more keys than there can be.
  """
  bound = spec.rule.softcap * _LOG2E
  return bound - 30 if 0 < bound <= 73 else None


def _tiles(spec, kind):
  """Yields the tiles of a block: (queries, keys, masked), with slices."""
  blocks = spec.blocks
  plain = not spec.rule.window and not spec.ids and not spec.S % blocks.k
  for r in range(0, blocks.q, blocks.tile_q):
    end = r + blocks.tile_q
    for c in range(0, end if kind == TRIANGLE else blocks.k, blocks.tile_k):
      stop = c + blocks.tile_k
      masked = kind == PARTIAL
      if kind == TRIANGLE:
        masked = stop > r + 1 or not plain
        stop = min(stop, end)
      yield slice(r, end), slice(c, stop), masked


def _seen(spec, queries, keys, i, j, ids):
  """The mask [keys, queries] of a tile of a block.

  Args:
    spec: tpu_launch.Spec.
    queries: slice of the queries of the block.
    keys: slice of its keys.
    i: position of the first query of the block, counted from key 0.
    j: first key of the block.
    ids: refs of the ids of the block, [1,q] and [1,k], if there are any.
  """
  shape = keys.stop - keys.start, queries.stop - queries.start
  key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  limit = i - j - keys.start
  if spec.folded:
    query = jax.lax.rem(query + queries.start, spec.folded)
  else:
    limit += queries.start
  ahead = key - query
  seen = []
  if spec.rule.causal:
    seen.append(ahead <= limit)
  if spec.rule.window:
    seen.append(ahead > limit - spec.rule.window)
  if spec.S % spec.blocks.k:
    seen.append(key < spec.S - j - keys.start)
  if spec.ids:
    q_ids, kv_ids = ids
    kv_ids = jnp.broadcast_to(kv_ids[:, keys], shape[::-1]).T
    seen.append(kv_ids == q_ids[:, queries])
  return functools.reduce(jnp.logical_and, seen)


def _visit(words, q_offset, spec):
  """Reads this grid step's visit: i, j (see _seen), kind, first, last."""
  step = pl.program_id(0) * spec.listed + pl.program_id(3)
  i, j, kind, first, last = tpu_blocks.unpack(words[step])
  return (i * spec.blocks.q + q_offset[0], j * spec.blocks.k, kind, first == 1,
          last == 1)


def _forward_kernel(words, q_offset, q, k, v, *refs, spec):
  *ids, out, lse, top, total, acc = refs
  i, j, kind, first, last = _visit(words, q_offset, spec)

  @pl.when(first)
  def _():
    known = _known_top(spec)
    top[...] = jnp.full_like(top, _LOWEST if known is None else known)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  for each in spec.kinds:
    if each != EMPTY:
      pl.when(kind == each)(functools.partial(
          _forward_block, spec, each, i, j, ids, q, k, v, top, total, acc))

  @pl.when(last)
  def _():
    sums = total[...]
    empty = sums == 0
    sums = jnp.where(empty, 1.0, sums)
    out[...] = (acc[...] / sums).T.astype(out.dtype)
    lse[...] = jnp.where(
        empty, -jnp.inf, top[...] / _LOG2E + jnp.log(sums))


def _forward_block(spec, kind, i, j, ids, q, k, v, top, total, acc):
  """Takes one block of keys into top, total [1,q] and acc [V,q]."""
  tiles = list(_tiles(spec, kind))
  turned = v[...].T
  if spec.blocks.mxu_sums:
    ones = jnp.ones((_ONES, turned.shape[1]), turned.dtype)
    turned = jnp.concatenate([turned, ones])
  scores = {}

  def start(t):
    queries, keys, _ = tiles[t]
    scores[t] = _scores(spec, k[keys], q[queries])[0]

  for t in range(min(spec.blocks.ahead, len(tiles))):
    start(t)
  for t, (queries, keys, masked) in enumerate(tiles):
    if t + spec.blocks.ahead < len(tiles):
      start(t + spec.blocks.ahead)
    s = scores.pop(t)
    if masked:
      seen = _seen(spec, queries, keys, i, j, ids)
      s = jnp.where(seen, s, _LOWEST)
    m = top[:, queries]
    new_m = m
    if _known_top(spec) is None:
      new_m = jnp.maximum(m, jnp.max(s, axis=0, keepdims=True))
    p = jnp.exp2(s - new_m)
    if masked:
      p = jnp.where(seen, p, 0.0)
    product = dot(turned[:, keys], p.astype(v.dtype), NN)
    width = acc.shape[0]
    if spec.blocks.mxu_sums:
      sums = product[width:width + 1]
    else:
      sums = jnp.sum(p, axis=0, keepdims=True)
    if new_m is not m:
      kept = jnp.exp2(m - new_m)
      top[:, queries] = new_m
      total[:, queries] *= kept
      acc[:, queries] *= kept
    total[:, queries] += sums
    acc[:, queries] += product[:width]


def _backward_kernel(words, q_offset, q, k, v, dout, rows, *refs, spec):
  *ids, dq, dk, dv, dq_acc, dk_acc, dv_acc = refs
  i, j, kind, first, last = _visit(words, q_offset, spec)
  step, steps = pl.program_id(3), pl.num_programs(3)
  head, heads = pl.program_id(2), pl.num_programs(2)
  keys = spec.blocks.k

  def each_block(body):
    def at(n, _):
      body(pl.ds(pl.multiple_of(n * keys, keys), keys))
    jax.lax.fori_loop(0, dk_acc.shape[0] // keys, at, None)

  @pl.when((head == 0) & (step == 0))
  def _():
    def clear(rows):
      dk_acc[rows] = jnp.zeros((keys, dk_acc.shape[1]), jnp.float32)
      dv_acc[rows] = jnp.zeros((keys, dv_acc.shape[1]), jnp.float32)
    each_block(clear)

  @pl.when(first)
  def _():
    dq_acc[...] = jnp.zeros_like(dq_acc)

  for each in spec.kinds:
    if each != EMPTY:
      pl.when(kind == each)(functools.partial(
          _backward_block, spec, each, i, j, ids, q, k, v, dout, rows, dq_acc,
          dk_acc, dv_acc))

  @pl.when(last)
  def _():
    dq[...] = (dq_acc[...] * spec.rule.scale).T.astype(dq.dtype)

  @pl.when((head == heads - 1) & (step == steps - 1))
  def _():
    def write(rows):
      dk[rows] = (dk_acc[rows] * spec.rule.scale).astype(dk.dtype)
      dv[rows] = dv_acc[rows].astype(dv.dtype)
    each_block(write)


def _backward_block(spec, kind, i, j, ids, q, k, v, dout, rows, dq, dk, dv):
  """Adds one block's share to dq [H,q], dk [keys,H] and dv [keys,V]."""
  tiles = list(_tiles(spec, kind))
  turned = k[...].T
  started = {}

  def start(t):
    queries, keys, _ = tiles[t]
    started[t] = (*_scores(spec, k[keys], q[queries]),
                  dot(v[keys], dout[queries], NT))

  for t in range(min(spec.blocks.ahead, len(tiles))):
    start(t)
  for t, (queries, keys, masked) in enumerate(tiles):
    if t + spec.blocks.ahead < len(tiles):
      start(t + spec.blocks.ahead)
    s, slope, dp = started.pop(t)
    p = jnp.exp2(s - rows[:1, queries])
    if masked:
      p = jnp.where(_seen(spec, queries, keys, i, j, ids), p, 0.0)
    ds = p * (dp - rows[1:, queries])
    if slope is not None:
      ds *= slope
    p, ds = p.astype(v.dtype), ds.astype(k.dtype)
    at = pl.ds(pl.multiple_of(j, spec.blocks.k) + keys.start,
               keys.stop - keys.start)
    dv[at] += dot(p, dout[queries], NN)
    dk[at] += dot(ds, q[queries], NN)
    dq[:, queries] += dot(turned[:, keys], ds, NN)
