"""Devices that are described, not attached: compilers and interpreters."""

import contextlib
import functools
import importlib.util
import os
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state.types import AbstractRef
from jax.experimental import mesh_utils, topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from attention.kernels.mosaic_tpu import CHIPS

H100 = pathlib.Path(__file__).with_name('h100.txtpb')
PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')

gpu_interpreter_exists = pytest.mark.skipif(
    not hasattr(plgpu, 'InterpretGPUParams'),
    reason='the interpreter of jax before 0.12 knows no register layouts')


def tpus(chip, name):
  """The devices of a topology; skips the test where libtpu cannot say."""
  pytest.importorskip('libtpu', reason='needs pip install libtpu')
  # No chip is opened: another process may hold libtpu's lock.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    return topologies.get_topology_desc(
        platform='tpu', topology_name=name).devices
  except (RuntimeError, jax.errors.JaxRuntimeError) as error:
    pytest.skip(f'libtpu does not describe a {chip}: {error}')


def tpu(chip):
  """One device of a chip."""
  return tpus(chip, CHIPS[chip].topology)[0]


def tpu_pod(*shape):
  """64 devices of v5p as an array of this shape."""
  return mesh_utils.create_device_mesh(
      shape, tpus('v5p', 'v5p:4x4x4'), allow_split_physical_axes=True)


@contextlib.contextmanager
def tpu_interpreter(capfd, *, races=True):
  """Runs TPU kernels on the CPU, and fails the test on a race."""
  params = pltpu.InterpretParams(
      detect_races=races, uninitialized_memory='nan',
      out_of_bounds_reads='raise')
  with pltpu.force_tpu_interpret_mode(params):
    yield
  assert 'RACE DETECTED' not in capfd.readouterr().out


@functools.cache
def h100s(number):
  """An array of so many described H100s."""
  return np.array(topologies.get_topology_desc(
      platform='cuda', target_config=H100.read_text(),
      topology=f'1x1x{number}').devices)


def require_h100_compiler(monkeypatch):
  """Prepares the compiler, to report registers; skips where there is none."""
  if not any(map(importlib.util.find_spec, PLUGINS)):
    pytest.skip('the CUDA plugin of jax is not installed')
  monkeypatch.setenv('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  monkeypatch.setenv('MOSAIC_GPU_DUMP_PTXAS', '1')


def wgmma_from_registers(self, eqn, token, get_invals, *, original):
  """The interpreter's wgmma takes a left operand in shared memory alone."""
  if isinstance(eqn.invars[1].aval, AbstractRef):
    return original(self, eqn, token, get_invals)

  def multiply(*, token, mesh_location, thread, acc, a, b, transforms):
    memory = gpu_callbacks._get_shared_memory()
    acc, b = map(gpu_callbacks.HostAllocationKey.from_array, (acc, b))
    where = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, None)
    read = lambda key, access: memory.get_buffer_content(
        key, access, thread, logging_info=where)[0]
    transforms = jax.tree.map(
        int, gpu_callbacks._remove_noop_transforms(transforms))
    right = read(b, memory.access(b, transforms))
    whole = memory.access(acc, ())
    total = read(acc, whole)
    total = total + np.matmul(a, right, dtype=total.dtype)
    memory.store_buffer_content(acc, whole, total, thread, logging_info=where)
    return token

  acc, a, b, *leaves = get_invals()
  transforms = jax.tree.unflatten(eqn.params['b_transforms_tree'], leaves)
  b, transforms = jaxpr_interpret.resolve_ref(
      eqn.invars[2].aval, b, transforms)
  return callback.io_callback(
      gpu_callbacks.fail_on_exception(multiply),
      gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token,
      mesh_location=self.mesh_location, thread=self.thread, acc=acc, a=a, b=b,
      transforms=transforms), []


@contextlib.contextmanager
def gpu_interpreter():
  """Runs Mosaic GPU kernels on the CPU, with a race detector."""
  gpu_callbacks.reset_gpu_interpret_mode_state()
  interpreter, name = jaxpr_interpret.JaxprInterpreter, '_interpret_wgmma_ref_p'
  wgmma = functools.partialmethod(
      wgmma_from_registers, original=getattr(interpreter, name))
  with (mock.patch.object(interpreter, name, wgmma),
        plgpu.force_gpu_interpret_mode(
            plgpu.InterpretGPUParams(detect_races=True))):
    yield
