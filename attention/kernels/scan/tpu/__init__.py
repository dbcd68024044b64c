"""Selective scan for TPU, forward and backward, in Pallas (Mosaic TPU).

docs/kernels.md has the design: where the state lies, what is done for a whole
chunk at once, and why.
"""

from attention.kernels import scan
from attention.kernels.mosaic_tpu import LANES, SUBLANES, check_dtypes
from attention.kernels.scan.tpu import backward_kernel, forward_kernel
from attention.kernels.scan.tpu.launch import Launch

# Channels times states, of which the backward kernel keeps two float32 arrays.
_MOST_STATES = 1 << 19


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
  check_dtypes(x=operands.x, dt=operands.dt, z=operands.z)
  E, M = operands.A.shape
  if M > 64:
    raise NotImplementedError(
        f'M ({M}): the TPU kernels take up to 64 states')
  if E * M > _MOST_STATES:
    raise NotImplementedError(
        f'E ({E}) x M ({M}): the TPU kernels keep up to {_MOST_STATES} states '
        'in VMEM: shard the channels')


def forward(operands, rule):
  """See `attention.kernels.scan`."""
  call = Launch(operands, rule, backward=False)
  series, shared = call.scratch_series(), call.scratch_shared()
  out = call.run(
      forward_kernel.kernel, name='scan_forward',
      operands=call.operands(operands),
      outputs=dict(
          y=call.series().out(operands.x.dtype), hT=call.out_state(),
          saved_h=call.saved().out()),
      scratch=dict(
          h=call.scratch_state(), wide_B=shared, wide_C=shared, d=series,
          u=series, s=series, partial=call.scratch_partial()),
      flops=6 * call.state_steps, transcendentals=call.state_steps)
  return (out.y, call.restore_state(out.hT)), out.saved_h


def backward(operands, rule, saved_h, cotangents):
  """See `attention.kernels.scan`."""
  dy, dhT = cotangents
  x, dt, z = operands.x, operands.dt, operands.z
  call = Launch(operands, rule, backward=True)
  series, shared = call.scratch_series(), call.scratch_shared()
  states, eight = call.scratch_state(), call.scratch_state(SUBLANES)
  partial, cut = call.scratch_partial(), call.plan.blocks
  out = call.run(
      backward_kernel.kernel, name='scan_backward',
      operands=dict(
          **call.operands(operands), dy=call.series().of(dy),
          dhT=call.state(dhT), saved_h=call.saved().of(saved_h)),
      outputs=dict(
          dx=call.series().out(x.dtype), ddt=call.series().out(dt.dtype),
          dz=None if z is None else call.series().out(z.dtype),
          dB=call.out_shared(), dC=call.out_shared(), dA=call.out_state(),
          dD=call.out_state(SUBLANES), ddt_bias=call.out_state(SUBLANES),
          dh0=call.out_state()),
      scratch=dict(
          dh=states, dA_acc=states, dD_acc=eight, ddt_bias_acc=eight,
          wide_B=shared, wide_C=shared, dB_acc=shared, dC_acc=shared,
          d=series, u=series, ds=series, du=series, dd=series,
          partial=partial, partial_d=partial,
          every_h=(cut.chunk + 1, len(cut.streams), call.plan.M, LANES),
          s=None if z is None else series),
      flops=20 * call.state_steps, transcendentals=call.state_steps)
  dD, ddt_bias = (
      each.sum((0, 1))[:x.shape[2]] for each in (out.dD, out.ddt_bias))
  return scan.Operands(
      x=out.dx, dt=out.ddt, A=call.restore_state(out.dA).sum(0),
      B=call.restore_shared(out.dB), C=call.restore_shared(out.dC), D=dD,
      z=out.dz, dt_bias=None if operands.dt_bias is None else ddt_bias,
      h0=call.restore_state(out.dh0), starts=None)
