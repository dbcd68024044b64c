"""What all kernels for Hopper have in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxprs_in_params

from attention.kernels import mosaic_gpu
from attention.kernels.chunked import chunked_linear_attention
from attention.kernels.flash import flash_attention
from attention.kernels.scan import selective_scan

pytestmark = pytest.mark.usefixtures('on_h100')


def struct(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


f32 = jnp.float32
HEADS = struct(1, 70, 2, 16)
WIDE = struct(1, 70, 2, 256)
IDS = np.repeat(np.arange(2, dtype=np.int32), 35)[None]


def flash(q, k, v, **options):
  return flash_attention(q, k, v, scale=1.0, implementation='gpu', **options)


def scan(x, dt, A, B, C, D):
  return selective_scan(x, dt, A, B, C, D, implementation='gpu')


def scan_arrays(T):
  series, shared = struct(1, T, 32), struct(1, T, 8)
  return (series, series, struct(32, 8, dtype=f32), shared, shared,
          struct(32, dtype=f32))


def chunked(q, k, v, decay=None, **options):
  return chunked_linear_attention(
      q, k, v, decay=decay, normalize=1e-6, implementation='gpu', **options)


# Calls that run all kernels of every op, and how many that are.
CALLS = {
    'flash': (flash, (HEADS,) * 3, 3),
    'flash-everything': (
        functools.partial(flash, window=20, softcap=5.0, segment_ids=IDS),
        (HEADS,) * 3, 3),
    'flash-wide': (flash, (WIDE,) * 3, 4),
    'scan': (scan, scan_arrays(70), 2),
    'scan-parts': (scan, scan_arrays(300), 4),
    'chunked': (chunked, (HEADS,) * 3, 4),
    'chunked-everything': (
        functools.partial(chunked, starts=np.diff(IDS, prepend=0) > 0),
        (*(HEADS,) * 3, struct(1, 70, 2, dtype=f32)), 4),
}


@functools.cache
def gradient(call):
  """Forward and backward of a call, in all of its arguments."""
  function, arguments, _ = CALLS[call]

  def loss(*arguments):
    return sum(x.astype(f32).sum()
               for x in jax.tree.leaves(function(*arguments)))

  return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))


def compiler_params(jaxpr):
  """Those of every Mosaic GPU kernel in a jaxpr."""
  found = []
  for equation in jaxpr.eqns:
    found += [x for x in equation.params.values()
              if isinstance(x, plgpu.CompilerParams)]
    for inner in jaxprs_in_params(equation.params):
      found += compiler_params(inner)
  return found


@pytest.mark.parametrize('call', CALLS)
def test_names_its_lowering_semantics(call):
  """The default is not the same in every version of jax."""
  _, arguments, number = CALLS[call]
  found = compiler_params(gradient(call).trace(*arguments).jaxpr.jaxpr)
  assert len(found) == number
  assert {x.lowering_semantics for x in found} == {
      plgpu.LoweringSemantics.Lane}


@pytest.mark.parametrize('call', CALLS)
def test_lowers_for_cuda(call):
  """On every version of jax, with no plugin."""
  _, arguments, number = CALLS[call]
  module = export.export(
      gradient(call), platforms=['cuda'],
      disabled_checks=[
          export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')])(*arguments)
  assert module.mlir_module().count('custom_call @mosaic_gpu') == number


def test_what_a_call_lacks_is_none():
  seen = {}

  def kernel(gmem, smem, plan):
    seen.update(gmem=gmem, smem=smem, plan=plan)

  result = jax.eval_shape(
      lambda x: mosaic_gpu.launch(
          kernel, 'plan', name='test', grid=dict(b=2),
          operands=dict(bias=None, x=x),
          outputs=dict(y=mosaic_gpu.like(x), lse=None),
          scratch=dict(x=mosaic_gpu.buffer(8), bias=None)), struct(8))
  assert seen['gmem'].x.shape == seen['gmem'].y.shape == (8,)
  assert seen['smem'].x.shape == (8,)
  assert seen['gmem'].bias is seen['gmem'].lse is seen['smem'].bias is None
  assert seen['plan'] == 'plan'
  assert result == dict(y=struct(8), lse=None)


@pytest.mark.parametrize('length, padded', [(1, 8), (8, 8), (9, 16)])
def test_pads_to_a_multiple(length, padded):
  x = mosaic_gpu.pad(jnp.ones((2, length, 3)), axis=1)
  assert x.shape == (2, padded, 3) and x.sum() == 2 * length * 3
