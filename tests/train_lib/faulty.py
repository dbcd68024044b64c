"""Kernels that compute something else than they should, for kernel_check."""

import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels.flash import xla

FAULTS = ('wrong', 'nan', 'raises', 'restless', 'hangs', 'dies', 'sound')


def kernel(fault):
  """An implementation of flash with a fault in its backward pass."""
  noise = iter(range(1, 100))

  def forward(operands, rule):
    if fault == 'raises':
      raise RuntimeError('no such instruction')
    return xla.forward(operands, rule)

  def backward(operands, rule, saved, dout):
    dq, dk, dv = xla.backward(operands, rule, saved, dout)
    if fault == 'wrong':
      return dq, dk * 1.1, dv
    if fault == 'nan':
      return dq, dk, dv.at[0, -1].set(jnp.nan)
    if fault == 'sound':
      return dq, dk, dv
    return jax.pure_callback(disturbed, dq, dq), dk, dv

  def disturbed(dq):
    if fault == 'hangs':
      time.sleep(1000)
    if fault == 'dies':
      sys.stdout.flush()
      import os
      os._exit(11)
    return np.asarray(dq) * np.float32(1 + 1e-6 * next(noise))

  return types.SimpleNamespace(
      check=lambda operands, rule: None, forward=forward, backward=backward)


def install(name, fault):
  """Puts a kernel where dispatch looks for flash's implementation `name`."""
  sys.modules[f'attention.kernels.flash.{name}'] = kernel(fault)
