"""The Hopper scan: interpreted on a CPU, and compiled for an absent H100.

The interpreter has shared memory that starts as NaN, and a race detector. The
compiler is the one of the CUDA plugin.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention.kernels import scan
from attention.kernels.scan import reference
from attention.kernels.scan.gpu import states
from tests.kernels import accelerators, oracle, test_scan
from tests.kernels.accelerators import gpu_interpreter_exists as interpreted
from tests.kernels.test_scan import assert_agree, example, run

pytestmark = pytest.mark.usefixtures('on_h100')

EVERYTHING = ('z', 'dt_bias', 'h0', 'starts')


@pytest.fixture
def interpreter():
  with accelerators.gpu_interpreter():
    yield


@pytest.fixture
def sized(monkeypatch):
  """Sets E and M of `example`, and into how many parts the time is cut."""
  def size(channels=12, state=4, cut=1):
    monkeypatch.setattr(test_scan, 'CHANNELS', channels)
    monkeypatch.setattr(test_scan, 'STATE', state)
    # As even as states.number makes them.
    monkeypatch.setattr(states, 'number', lambda blocks, chunks: (
        -(-chunks // -(-chunks // cut))))
  return size


def kernel():
  """The op, to be traced anew: what `sized` changes is no argument of it."""
  return functools.partial(scan.selective_scan, implementation='gpu')


def compare(arguments, **options):
  assert_agree(run(kernel(), arguments, **options),
               run(reference.selective_scan, arguments, **options))


@interpreted
@pytest.mark.parametrize('time, options, size', [
    pytest.param(1, EVERYTHING, {}, id='T1-all'),
    pytest.param(63, EVERYTHING, dict(state=16), id='T63-all-M16'),
    pytest.param(40, EVERYTHING, dict(cut=3), id='T40-parts'),
])
def test_matches_reference(time, options, size, sized, interpreter):
  sized(**size)
  compare(example(time, options))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('time, options, size', [
    pytest.param(63, (), dict(state=8), id='T63-bare-M8'),
    pytest.param(30, EVERYTHING, dict(channels=131, state=16),
                 id='T30-all-E131-M16'),
    pytest.param(257, ('dt_bias', 'h0'), {}, id='T257-h0'),
    pytest.param(100, EVERYTHING, dict(channels=8, state=16, cut=7),
                 id='T100-all-parts'),
    pytest.param(20, ('z', 'h0', 'starts'), dict(state=64),
                 id='T20-M64'),
    pytest.param(40, EVERYTHING, dict(state=20, cut=2), id='T40-M20-parts'),
])
def test_matches_reference_everywhere(time, options, size, sized, interpreter):
  sized(**size)
  compare(example(time, options))


@interpreted
@pytest.mark.slow
def test_steps_without_softplus(sized, interpreter):
  sized()
  arguments = example(63, ('z', 'h0'))
  arguments['dt'] = jnp.abs(arguments['dt'])
  compare(arguments, dt_softplus=False)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_keep_a_float32_state(dtype, sized, interpreter):
  sized()
  arguments = example(40, ('z', 'h0'), dtype=dtype)
  got = run(kernel(), arguments)
  assert got['y'].dtype == dtype and got['hT'].dtype == jnp.float32
  want = run(reference.selective_scan, arguments)
  assert_agree({'hT': got['hT']}, {'hT': want['hT']})
  assert_agree(got, want, tolerance=5e-3)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('cut', [1, 2])
def test_extreme_steps(cut, sized, interpreter):
  sized(cut=cut)
  arguments = example(40, ('h0',))
  # Steps of nothing, of 1e-30, and of A * step = -50 and far beyond.
  steps = jnp.array([0.0, 1e-30, 1.0, 50.0, 1e4])
  arguments['dt'] = jnp.broadcast_to(
      steps[jnp.arange(40) % 5][None, :, None], arguments['x'].shape)
  compare(arguments, dt_softplus=False)
  arguments['dt'] = jnp.full_like(arguments['dt'], -200.0)
  got = run(kernel(), arguments)
  assert all(bool(jnp.isfinite(value).all()) for value in got.values())


@interpreted
@pytest.mark.slow
def test_small_steps_are_as_exact_as_large_ones(sized, interpreter):
  sized()
  arguments = example(20)
  # log(1 + e^dt) is e^dt here: an addition to 1 would lose it.
  arguments['dt'] = arguments['dt'] - 15
  compare(arguments)


@interpreted
@pytest.mark.slow
def test_the_same_bits_twice(sized, interpreter):
  sized(channels=131, cut=2)
  arguments = example(20, EVERYTHING)
  op = kernel()
  one, two = (run(op, arguments) for _ in range(2))
  for name in one:
    assert oracle.same_bits(one[name], two[name]), name


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('garbage, cut', [
    (3.0, 1), (np.inf, 1), (np.nan, 1), (np.nan, 4)])
def test_documents_are_isolated_bit_for_bit(garbage, cut, sized, interpreter):
  sized(cut=cut)
  arguments = example(64, ('z', 'dt_bias', 'h0', 'starts'))
  arguments['starts'] = oracle.starts(25, 25, 14)
  changed = dict(arguments)
  for name in ('x', 'dt', 'B', 'C', 'z'):
    changed[name] = arguments[name].at[:, 25:50].set(garbage)
  op = kernel()
  before, after = (run(op, a) for a in (arguments, changed))
  for name in ('y', 'dx', 'ddt', 'dB', 'dC', 'dz'):
    for other in (slice(0, 25), slice(50, 64)):
      assert oracle.same_bits(before[name][:, other], after[name][:, other])
  for name in ('hT', 'dh0'):
    assert oracle.same_bits(before[name], after[name])


@interpreted
@pytest.mark.slow
def test_parts_equal_the_whole(sized, interpreter):
  arguments = None
  results = []
  for cut in (1, 3):
    sized(cut=cut)
    arguments = arguments or example(50, EVERYTHING)
    results.append(run(kernel(), arguments))
  assert_agree(*results)


@pytest.mark.parametrize('change, reason', [
    (dict(A=jnp.zeros((12, 65)), B=jnp.zeros((2, 8, 65)),
          C=jnp.zeros((2, 8, 65))), 'up to 64 states'),
    (dict(x=jnp.zeros((2, 8, 12), jnp.int32)), 'not int32, which x is'),
], ids=['M65', 'int32'])
def test_declines(change, reason, sized):
  sized()
  arguments = {**example(8), **change}
  with pytest.raises(NotImplementedError, match=reason):
    scan.selective_scan(**arguments, implementation='gpu')


@pytest.mark.parametrize('reverse', [False, True])
def test_states_that_enter_parts(reverse):
  rng = np.random.default_rng(0)
  initial, ends, log_decay = (
      rng.standard_normal(shape) for shape in ((1, 3, 2), *[(1, 4, 3, 2)] * 2))
  cut = np.array([[False, True, False, False]])
  # A document that ends in a cut part may hold anything.
  ends[0, 0] = np.nan
  log_decay[0, 1] = np.inf
  got = states.entering(initial, ends, log_decay, cut, reverse=reverse)
  h, order = initial[0], range(4)[::-1] if reverse else range(4)
  for p in order:
    np.testing.assert_allclose(got[0, p], h, rtol=1e-5)
    through = 0 if cut[0, p] else np.exp(log_decay[0, p]) * h
    h = ends[0, p] + through


@pytest.mark.parametrize('blocks, chunks, number', [
    (256, 128, 1), (128, 128, 3), (32, 128, 9), (2, 128, 32), (2, 5, 1),
    (1, 1, 1), (2, 17, 4)])
def test_parts_fill_the_chip(blocks, chunks, number):
  assert states.number(blocks, chunks) == number
  length = -(-chunks // number)
  assert (number - 1) * length < chunks, 'no part is empty'


@pytest.fixture
def compiler(monkeypatch):
  accelerators.require_h100_compiler(monkeypatch)


def compile_gradients(T, E, M, *, batch=2, dtype=jnp.bfloat16, devices=1,
                      full=True):
  """Forward and backward, compiled; the batch is split over the devices."""
  mesh = Mesh(accelerators.h100s(devices), ('data',))

  def struct(*shape, dtype=dtype, spec=P('data')):
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec))

  f32 = functools.partial(struct, dtype=jnp.float32)
  arrays = dict(
      x=struct(batch, T, E), dt=struct(batch, T, E), A=f32(E, M, spec=P()),
      B=struct(batch, T, M), C=struct(batch, T, M), D=f32(E, spec=P()))
  if full:
    arrays |= dict(z=struct(batch, T, E), dt_bias=f32(E, spec=P()),
                   starts=struct(batch, T, dtype=bool))
  specs = {name: array.sharding.spec for name, array in arrays.items()}
  sharded = jax.shard_map(
      lambda arrays: kernel()(**arrays), mesh=mesh, in_specs=(specs,),
      out_specs=P('data'), check_vma=False)

  def loss(arrays, ids):
    y, hT = sharded(arrays | ids)
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(hT)

  ids = {name: arrays.pop(name) for name in test_scan.IDS & set(arrays)}
  return jax.jit(jax.grad(loss)).lower(arrays, ids).compile()


@pytest.mark.slow
@pytest.mark.parametrize('T, E, M, options', [
    (2048, 4096, 16, dict(batch=8)), (2048, 4096, 16, dict(full=False)),
    (2048, 256, 16, {}), (1001, 1024, 16, dict(dtype=jnp.float32, batch=16)),
    (512, 1021, 8, {}), (256, 512, 64, {}),
    (256, 512, 64, dict(dtype=jnp.float32)),
    (512, 512, 32, dict(dtype=jnp.float16))], ids=str)
def test_h100_compiler_takes(T, E, M, options, compiler, capfd):
  compiled = compile_gradients(T, E, M, **options)
  report = capfd.readouterr().out
  spills = {name: int(size) for name, size in re.findall(
      r"'scan_(\w+)_mosaic_gpu_kernel' for.*?(\d+) bytes spill stores", report,
      re.DOTALL)}
  assert {'forward', 'backward'} <= set(spills), report
  # Of 255 registers a thread, some words in a group of four steps.
  assert spills.pop('backward') <= 64
  assert not any(spills.values()), spills
  batch = options.get('batch', 2)
  # The states before chunks of 16 steps are what is kept.
  states = batch * (T + 15) * (E + 7) * M
  assert oracle.largest_buffer(compiled) <= states // min(M, 16)
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * states


@pytest.mark.slow
def test_h100_compiler_takes_eight_devices(compiler):
  text = compile_gradients(256, 512, 16, batch=16, devices=8).as_text()
  assert 'all-reduce' in text, 'the gradients of A and D'
