"""Selective scan for Hopper GPUs, in Mosaic GPU.

A thread block takes 128 channels through a part of the sequence, a channel in
each thread with its states in registers, 16 steps at a time. Where the blocks
of channels do not fill the chip, the sequence is cut into parts that run at
once: a first pass finds what each of them ends with (`states`).
"""

import jax.numpy as jnp

from attention.kernels import dispatch, scan
from attention.kernels.mosaic_gpu import pad
from attention.kernels.scan.gpu import launch, states

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MOST_STATES = 64


def check(operands, rule):
  """Raises NotImplementedError for what these kernels decline."""
  del rule
  dispatch.require_hopper()
  for name, array in operands._replace(starts=None)._asdict().items():
    if array is not None and array.dtype not in _DTYPES:
      raise NotImplementedError(
          f'gpu takes float32, bfloat16 and float16, not {array.dtype}, '
          f'which {name} is')
  M = operands.A.shape[1]
  if M > _MOST_STATES:
    raise NotImplementedError(
        f'gpu takes up to {_MOST_STATES} states (M), which fit the registers, '
        f'not {M}')


def forward(operands, rule):
  """See `attention.kernels.scan`."""
  plan, arrays = launch.prepare(operands, rule)
  E, M = operands.A.shape
  h0 = _entering(plan, arrays, operands, operands.h0)
  out = launch.forward(plan, arrays, h0=h0)
  return ((out['y'][..., :E], launch.join_states(out['hT'], E, M)),
          out['states'])


def backward(operands, rule, saved, cotangents):
  """See `attention.kernels.scan`."""
  dy, dhT = cotangents
  plan, arrays = launch.prepare(operands, rule)
  T, (E, M) = plan.T, operands.A.shape
  arrays['dy'] = pad(dy, axis=-1)
  dhT = _entering(plan._replace(reverse=True), arrays, operands, dhT)
  out = launch.gradients(plan, arrays, states=saved, dhT=dhT)
  dbias, dD = out['drows'].sum((0, 1))[:, :E]
  # [B,2,tiles,T width] to [2,B,T,M]
  dcommon = out['dcommon'].sum(1).reshape(
      -1, 2, plan.tiles, plan.steps, plan.width)
  dB, dC = dcommon.transpose(1, 0, 3, 2, 4).reshape(
      2, -1, plan.steps, plan.M)[:, :, :T, :M]
  return scan.Operands(
      x=out['dx'][..., :E], dt=out['ddt'][..., :E],
      A=launch.join_states(out['dA'].sum((0, 1)), E, M), B=dB, C=dC, D=dD,
      z=None if operands.z is None else out['dz'][..., :E],
      dt_bias=None if operands.dt_bias is None else dbias,
      h0=launch.join_states(out['dh0'], E, M), starts=None)


def _entering(plan, arrays, operands, initial):
  """[B,parts,tiles,E,width]: what enters each part, of what enters the first.

  Args:
    plan: reverse for the adjoint, where the last part is entered first.
    arrays: of launch.prepare, with dy for the adjoint.
    operands: of the call.
    initial: [B,E,M].
  """
  initial = initial.astype(jnp.float32)
  if plan.parts == 1:
    return launch.split_states(plan, initial[:, None])
  (E, M), out = operands.A.shape, launch.ends(plan, arrays)
  log_decay = out['sums'][..., :E, None] * operands.A.astype(jnp.float32)
  entering = states.entering(
      initial, launch.join_states(out['ends'], E, M), log_decay,
      states.cut(plan, operands.starts), reverse=plan.reverse)
  return launch.split_states(plan, entering)
