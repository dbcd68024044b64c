"""The Hopper kernels: interpreted on a CPU, and compiled for an absent H100.

The interpreter runs the warpgroups as threads, with shared memory that starts
as NaN and a race detector. The compiler is the one of the CUDA plugin.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state.types import AbstractRef
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention.kernels.flash import (
    Operands,
    Rule,
    cudnn,
    flash_attention,
    gpu,
)
from attention.kernels.flash.gpu import blocks, launch
from tests.kernels import accelerators, test_flash
from tests.kernels.accelerators import gpu_interpreter_exists as interpreted
from tests.kernels.test_flash import NAMES, Row, make, run

pytestmark = pytest.mark.usefixtures('on_h100')

FEATURES = {
    'plain': {}, 'bidirectional': dict(causal=False),
    'window': dict(window=1024), 'softcap': dict(softcap=50.0),
    'segments': dict(segments=True),
    'everything': dict(window=1024, softcap=50.0, segments=True)}
# Bytes that dkv spills: the slope of a softcap wants six more registers.
SPILLS = {('softcap', 128): 24, ('everything', 128): 24}

# The tensor cores take widths in steps of 16.
COMMON_ROWS = tuple(
    row._replace(H=-(-row.H // 16) * 16, V=-(-row.V // 16) * 16)
    for row in test_flash.ROWS)
# Several blocks of queries and keys, ragged, with full blocks among them.
FAST_ROWS = (
    Row('all at once', T=130, S=290, N=2, K=1, H=32, V=64, q_offset=160,
        window=150, softcap=2.0, segments=True, sink=True),
    Row('causal', T=300, N=2, K=1, H=64, V=64),
    Row('empty rows traced', T=63, S=100, q_offset=-20, traced=True, sink=True),
)
LONG_ROWS = (
    Row('long', T=520, N=1, K=1, H=64, V=64),
    Row('long window', T=520, N=1, K=1, H=128, V=128, window=200),
    Row('long segments', T=520, N=2, K=1, H=64, V=64, segments=True),
    Row('long bidirectional', T=100, S=520, N=1, K=1, H=64, V=128,
        causal=False),
    *(Row(f'{H} by {V}', T=200, N=2, K=1, H=H, V=V, softcap=2.0)
      for H, V in ((80, 80), (96, 32), (192, 128), (256, 256))),
)


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


@pytest.fixture
def interpreter(monkeypatch):
  name = '_interpret_wgmma_ref_p'
  original = getattr(jaxpr_interpret.JaxprInterpreter, name)
  monkeypatch.setattr(
      jaxpr_interpret.JaxprInterpreter, name,
      functools.partialmethod(wgmma_from_registers, original=original))
  with accelerators.gpu_interpreter():
    yield


def cast(arguments, cotangents, dtype, wide=jnp.float32):
  """q, k, v and dout in one dtype, sink and dlse in another."""
  to = lambda dtype, xs: [None if x is None else jnp.asarray(x, dtype)
                          for x in xs]
  q_k_v, ids, (sink, offset) = arguments[:3], arguments[3:5], arguments[5:]
  return ((*to(dtype, q_k_v), *ids, *to(wide, [sink]), offset),
          (*to(dtype, cotangents[:1]), *to(wide, cotangents[1:])))


def compare(row, dtype=jnp.bfloat16):
  """At most twice the error of rounding the reference's inputs and outputs.

  The gradient of a sink is made of out as it was rounded: a unit more.
  """
  arguments, cotangents = cast(*make(row), dtype)
  actual = run(
      row, functools.partial(flash_attention, implementation='gpu'),
      arguments, cotangents)
  exact = test_flash.expected(row)
  with jax.enable_x64(True):
    rounded = run(row, test_flash.reference.attention,
                  *cast(arguments, cotangents, jnp.float64, jnp.float64))
  for name, a, r, e in zip(NAMES, actual, rounded, exact):
    seen = np.isfinite(e)
    np.testing.assert_array_equal(np.isneginf(a), ~seen)
    a, r, e = (np.asarray(x)[seen] for x in (a, r, e))
    if a.dtype == dtype:
      r = r.astype(dtype)
    error, allowed = (
        np.sqrt(np.mean((x.astype(np.float64) - e) ** 2)) if e.size else 0.0
        for x in (a, r))
    if name == 'dsink':
      unit = float(jnp.finfo(dtype).eps) / 2
      allowed += unit / 2 * np.sqrt(np.mean(e ** 2))
    assert error <= 2 * allowed + 1e-6, f'{name}: {error:.1e} > 2 {allowed:.1e}'


@interpreted
@test_flash.rows(argvalues=FAST_ROWS)
def test_matches_reference(row, interpreter):
  compare(row)


@interpreted
@pytest.mark.slow
@test_flash.rows(argvalues=COMMON_ROWS + LONG_ROWS)
def test_matches_reference_everywhere(row, interpreter):
  compare(row)


@interpreted
@pytest.mark.slow
def test_float16_matches_reference(interpreter):
  compare(Row('', T=200, window=70, sink=True), jnp.float16)


@interpreted
@pytest.mark.slow
def test_same_bits_twice_and_finite_at_huge_scores(interpreter):
  row = Row('', T=100, N=2, K=1, segments=True, sink=True)
  (q, *others), cotangents = cast(*make(row), jnp.bfloat16)
  op = functools.partial(flash_attention, implementation='gpu')
  first, second = (run(row, op, (q * 1e4, *others), cotangents)
                   for _ in range(2))
  for a, b in zip(first, second):
    assert np.all(np.isfinite(np.asarray(a, np.float32)))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('options, reason', [
    (dict(q=jnp.zeros((1, 8, 2, 64))), 'float32'),
    (dict(v=jnp.zeros((1, 8, 1, 24), jnp.bfloat16)), 'V that 16 divides'),
    (dict(scale=-1.0), 'scale'),
], ids=['float32', 'narrow', 'negative'])
def test_declines(options, reason):
  q, k, v = (jnp.zeros((1, 8, n, 64), jnp.bfloat16) for n in (2, 1, 1))
  options = dict(q=q, k=k, v=v, scale=0.1) | options
  scale = options.pop('scale')
  with pytest.raises(NotImplementedError, match=reason):
    gpu.check(Operands(**options, q_ids=None, kv_ids=None, q_offset=0),
              Rule(scale))


def test_fully_visible_blocks_take_no_mask_and_empty_ones_no_time():
  plan = launch.Plan(
      Rule(0.1, window=384), segments=True, S=1024, G=1, block=128, stages=2)
  ids = jnp.repeat(jnp.arange(2), 512)[None]
  q = jnp.zeros((1, 1024, 1, 64))
  operands = Operands(q, q, q, ids, ids, 0)
  spans = blocks.query_spans(plan, operands)['spans'][0]
  spans = blocks.Span(*np.moveaxis(np.asarray(spans), -1, 0))
  np.testing.assert_array_equal(spans.start, [0, 0, 0, 0, 4, 4, 4, 4])
  np.testing.assert_array_equal(spans.stop, np.arange(1, 9))
  full = [list(range(a, b)) for a, b in zip(spans.full_start, spans.full_stop)]
  assert full == [[], [0], [0, 1], [1, 2], [], [4], [4, 5], [5, 6]]


def test_cudnn_gets_an_output_with_the_delta_asked_for():
  random = np.random.default_rng(0)
  dout = jnp.asarray(random.normal(size=(2, 5, 3, 64)), jnp.bfloat16)
  delta = jnp.asarray(random.normal(size=(2, 3, 5)), jnp.float32)
  out = cudnn._output_of(dout, delta)
  product = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1)
  np.testing.assert_allclose(
      product.swapaxes(1, 2), delta, atol=3e-3, rtol=3e-3)
  silent = cudnn._output_of(0 * dout, delta.at[0].set(0.0))
  assert jnp.all(silent[0] == 0) and jnp.all(jnp.isnan(silent[1]))


def compile_gradients(T, S, H, V, *, devices=1, dtype=jnp.bfloat16,
                      implementation='gpu', segments=False, **options):
  """Forward and backward of 8 heads on 2, compiled; batch 1 on each device."""
  mesh = Mesh(accelerators.h100s(devices), ('data',))
  sharding = NamedSharding(mesh, P('data'))
  struct = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(
      (devices, *shape), dtype, sharding=sharding)

  def loss(q, k, v, *ids):
    out, lse = flash_attention(
        q, k, v, scale=0.1, implementation=implementation,
        segment_ids=ids or None, **options)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

  gradients = jax.shard_map(
      jax.grad(loss, argnums=(0, 1, 2)), mesh=mesh, in_specs=P('data'),
      out_specs=P('data'), check_vma=False)
  arrays = [struct(T, 8, H), struct(S, 2, H), struct(S, 2, V)]
  if segments:
    arrays += [struct(T, dtype=jnp.int32), struct(S, dtype=jnp.int32)]
  return jax.jit(gradients).lower(*arrays).compile()


@pytest.fixture
def compiler(monkeypatch):
  accelerators.require_h100_compiler(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('width', [64, 128])
@pytest.mark.parametrize('feature', FEATURES)
def test_h100_keeps_all_in_registers(feature, width, compiler, capfd):
  compiled = compile_gradients(2048, 2048, width, width, **FEATURES[feature])
  report = capfd.readouterr().out
  spills = re.findall(r'(\d+) bytes spill stores.*loads\n', report)
  assert len(spills) >= 3, report
  assert max(map(int, spills)) <= SPILLS.get((feature, width), 0), report
  assert '2048,2048' not in compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize('T, S, H, V', [
    (1, 4096, 128, 128), (1000, 1000, 32, 32), (257, 1001, 80, 80),
    (300, 300, 96, 96), (512, 512, 64, 128), (512, 512, 192, 128),
    (512, 512, 256, 256)], ids=str)
def test_h100_compiler_takes(T, S, H, V, compiler):
  compile_gradients(T, S, H, V, q_offset=S - T, softcap=30.0, window=100)


@pytest.mark.slow
def test_h100_compiler_takes_float16(compiler):
  compile_gradients(512, 512, 64, 64, dtype=jnp.float16)


@pytest.mark.slow
def test_h100_compiler_takes_eight_devices(compiler):
  compile_gradients(1024, 1024, 128, 128, devices=8, segments=True)


@pytest.mark.slow
def test_cudnn_compiles(compiler, monkeypatch):
  monkeypatch.setattr(cudnn.fused, 'check_cudnn_version', lambda: 91000)
  text = compile_gradients(
      1024, 1024, 64, 64, implementation='cudnn', window=256).as_text()
  assert 'fmhaSoftmaxBackward' in text and '1024,1024' not in text
