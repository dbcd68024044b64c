"""What all kernels for Hopper have in common."""

import jax
import jax.numpy as jnp
import pytest
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
SERIES = struct(1, 70, 32)
SHARED = struct(1, 70, 8)
HEADS = struct(1, 70, 2, 16)
# Of every op what runs all of its kernels, and how many they are.
CALLS = {
    'flash': (
        lambda q, k, v: flash_attention(
            q, k, v, scale=1.0, implementation='gpu'),
        (HEADS, HEADS, HEADS), 3),
    'flash wide': (
        lambda q, k, v: flash_attention(
            q, k, v, scale=1.0, implementation='gpu'),
        (struct(1, 70, 2, 256),) * 3, 4),
    'scan': (
        lambda *arrays: selective_scan(*arrays, implementation='gpu'),
        (SERIES, SERIES, struct(32, 8, dtype=f32), SHARED, SHARED,
         struct(32, dtype=f32)), 2),
    'scan in parts': (
        lambda *arrays: selective_scan(*arrays, implementation='gpu'),
        (struct(1, 300, 32), struct(1, 300, 32), struct(32, 8, dtype=f32),
         struct(1, 300, 8), struct(1, 300, 8), struct(32, dtype=f32)), 4),
    'chunked': (
        lambda q, k, v: chunked_linear_attention(
            q, k, v, normalize=1e-6, implementation='gpu'),
        (HEADS, HEADS, HEADS), 4),
}


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
  """Of a version's default the kernels of another one would not compile."""
  function, arguments, number = CALLS[call]

  def loss(*arguments):
    return sum(x.astype(f32).sum()
               for x in jax.tree.leaves(function(*arguments)))

  gradient = jax.grad(loss, argnums=tuple(range(len(arguments))))
  found = compiler_params(jax.make_jaxpr(gradient)(*arguments).jaxpr)
  assert len(found) == number
  assert {x.lowering_semantics for x in found} == {
      plgpu.LoweringSemantics.Lane}


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
