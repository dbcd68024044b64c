"""Flash attention for TPU, forward and backward, in Pallas (Mosaic TPU).

docs/kernels.md has the design: visits, transposed scores, blocks. Online
softmax: https://arxiv.org/abs/1805.02867; backward:
https://arxiv.org/abs/2205.14135.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention.kernels.flash import decline_bias
from attention.kernels.flash.tpu import (
    backward_kernel,
    blocks,
    forward_kernel,
)
from attention.kernels.flash.tpu.launch import Launch
from attention.kernels.mosaic_tpu import check_dtypes, check_widths


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  q, k, v, q_ids, _, q_offset, *_ = operands
  decline_bias('tpu', operands)
  check_dtypes(q=q)
  B, T, _, H = q.shape
  S, V = k.shape[1], v.shape[3]
  check_widths(H, V)
  for backward in (False, True):
    cut = blocks.sizes(
        T, S, widest=max(H, V), itemsize=q.dtype.itemsize, backward=backward,
        window=rule.window, packed=q_ids is not None)
    if max(pl.cdiv(T, cut.q), pl.cdiv(S, cut.k)) > blocks.MAX_BLOCKS:
      raise NotImplementedError(
          f'T ({T}) and S ({S}): the TPU kernels take up to '
          f'{blocks.MAX_BLOCKS} blocks of {cut.q}: shard the sequence')
    rows, *_ = blocks.candidates(
        cut, T, S, q_offset, causal=rule.causal, window=rule.window)
    listed = rows.size * (B if q_ids is not None else 1)
    if listed > blocks.MAX_VISITS:
      raise NotImplementedError(
          f'batch {B}, T ({T}) and S ({S}) make a list of {listed} blocks, '
          f'scalar memory holds {blocks.MAX_VISITS}: shard the batch or '
          'the sequence')


def forward(operands, rule):
  """See `attention.kernels.flash`."""
  q, _, v, *_ = operands
  H, V = q.shape[3], v.shape[3]
  call = Launch(operands, rule, backward=False)
  row = 1, call.plan.blocks.q
  out = call.run(
      forward_kernel.kernel, name='flash_forward',
      operands=call.operands(operands),
      outputs=dict(
          out=call.queries(call.V).out(q.dtype), lse=call.rows().out()),
      scratch=dict(m=row, l=row, out_acc=(call.V, call.plan.blocks.q)),
      flops=2 * call.scores * (H + V), transcendentals=call.scores)
  return call.restore_queries(out.out, V), call.restore_rows(out.lse)


def backward(operands, rule, saved, dout):
  """See `attention.kernels.flash`."""
  q, k, v, _, kv_ids, q_offset, *_ = operands
  S, most = k.shape[1], blocks.most_keys(
      k.shape[3], v.shape[3], k.dtype.itemsize)
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
  (_, k, v, *_), (lse, delta) = operands, saved
  H, V = k.shape[3], v.shape[3]
  call = Launch(operands, rule, backward=True)
  out = call.run(
      backward_kernel.kernel, name='flash_backward',
      operands=call.operands(operands, dout=dout, lse=lse, delta=delta),
      outputs=dict(
          dq=call.queries(call.H).out(dq_dtype),
          dk=call.all_keys(call.H).out(k.dtype),
          dv=call.all_keys(call.V).out(v.dtype)),
      scratch=dict(
          dq_acc=(call.H, call.plan.blocks.q), dk_acc=(call.n_keys, call.H),
          dv_acc=(call.n_keys, call.V)),
      flops=2 * call.scores * (3 * H + 2 * V), transcendentals=call.scores)
  return (call.restore_queries(out.dq, H), call.restore_keys(out.dk, H),
          call.restore_keys(out.dv, V))
