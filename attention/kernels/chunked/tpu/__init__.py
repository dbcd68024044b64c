"""Linear attention in chunks for TPU, in Pallas (Mosaic TPU).

In a chunk of C steps, with rows for the queries of all G heads:

  W = q k^T * D        D[t,s] = exp(sum of decays of s+1..t) for s <= t
  y = W v + a q S      a[t] = exp(sum of decays up to t)
  S = e S + (b k)^T v  b[s] = exp(sum of decays after s), e that of them all

With a normaliser y is divided by the row sums of W plus a q z, plus eps, where
z is to k as S is to k v^T. Products take S, W and b k in the dtype of the
inputs and add up in float32. docs/kernels.md has the rest of the design.
"""

from attention.kernels import chunked
from attention.kernels.chunked.tpu import backward_kernel, forward_kernel
from attention.kernels.chunked.tpu.launch import Launch
from attention.kernels.mosaic_tpu import check_dtypes, check_widths


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
  q, k, v, *_ = operands
  check_dtypes(q=q, k=k, v=v)
  if not q.dtype == k.dtype == v.dtype:
    raise NotImplementedError(
        f'q, k and v of dtypes {q.dtype}, {k.dtype} and {v.dtype}: the TPU '
        'kernels take the same for all')
  check_widths(q.shape[-1], v.shape[-1])


def forward(operands, rule):
  """See `attention.kernels.chunked`."""
  v = operands.v
  call = Launch(operands, rule, backward=False)
  S, z, H, V = call.S, call.z, call.H, call.V
  products = call.plan.blocks.chunk * (H + V) + 2 * H * V
  out = call.run(
      forward_kernel.kernel, name='chunked_forward',
      operands=call.operands(operands),
      outputs=dict(
          y=call.queries(V).out(v.dtype), sT=call.out_state(S),
          zT=call.out_state(z), saved_S=call.saved(S).out(),
          saved_z=None if z is None else call.saved(z).out()),
      scratch=dict(S=S, z=z, **call.scratch_decays(operands.decay)),
      flops=2 * call.query_steps * products, transcendentals=0)
  y = call.restore_queries(out.y, v.shape[-1])
  states = call.restore_states(out.sT, out.zT, operands.s0, total=False)
  return (y, *states), (out.saved_S, out.saved_z)


def backward(operands, rule, saved, cotangents):
  """See `attention.kernels.chunked`."""
  q, k, v, decay, s0, *_ = operands
  dy, dsT, dzT = cotangents
  saved_S, saved_z = saved
  call = Launch(operands, rule, backward=True)
  S, z, H, V = call.S, call.z, call.H, call.V
  chunks = call.plan.blocks.chunks
  products = call.plan.blocks.chunk * (3 * H + 2 * V) + 5 * H * V
  out = call.run(
      backward_kernel.kernel, name='chunked_backward',
      operands=dict(
          **call.operands(operands, dy=dy.astype(v.dtype)),
          saved_S=call.saved(S).of(saved_S),
          saved_z=None if z is None else call.saved(z).of(saved_z),
          dsT=call.first_state(dsT), dzT=call.first_state(dzT)),
      outputs=dict(
          dq=call.out_queries(H, q.dtype),
          dk=call.out_heads(call.J, H, k.dtype),
          dv=call.out_heads(call.K, V, v.dtype), ddecay=call.out_decay(decay),
          ds0=call.out_state(S), dz0=call.out_state(z)),
      scratch=dict(
          dS=S, dz=z, every_S=(chunks, *S),
          every_z=None if z is None else (chunks, *z),
          **call.scratch_decays(decay)),
      flops=2 * call.query_steps * products, transcendentals=0)
  ds0, dz0 = call.restore_states(out.ds0, out.dz0, s0, total=True)
  return chunked.Operands(
      q=call.restore_dq(out.dq, q.shape[-1]),
      k=call.restore_heads(out.dk, call.J, k.shape[-1]),
      v=call.restore_heads(out.dv, call.K, v.shape[-1]),
      decay=call.restore_decay(out.ddecay), s0=ds0, z0=dz0, starts=None)
