"""The TPU kernels of chunked linear attention: interpreted, and compiled.

The interpreter runs with NaN in memory that nothing wrote, raises on reads
out of bounds, and reports races. The compiler is the real one: libtpu builds
for chips that are only described.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attention.kernels.chunked import chunked_linear_attention, reference
from attention.kernels.chunked.tpu import blocks
from attention.kernels.mosaic_tpu import CHIPS, padded_width
from tests.kernels import accelerators, oracle, test_chunked
from tests.kernels.test_chunked import EVERYTHING, assert_agree, example, run

pytestmark = pytest.mark.usefixtures('on_tpu')

STATE = ('s0',)


class Shape(NamedTuple):
  """A row of the table of what the compilers must take."""
  id: str
  H: int = 128
  V: int = 128
  T: int = 2048
  N: int = 4
  K: int = 2
  dtype: type = jnp.bfloat16
  decay: bool = False
  segments: bool = False
  normalize: float | None = None


SHAPES = (
    Shape('H32', 32, 32),
    Shape('H64', 64, 64),
    Shape('H128'),
    Shape('normalized', normalize=1e-6),
    Shape('H192V80', 192, 80, T=1300, decay=True),
    Shape('H256', 256, 256, decay=True, normalize=1e-6),
    Shape('float32-H256', 256, 256, K=1, dtype=jnp.float32, decay=True,
          normalize=1e-6),
    Shape('everything', N=8, K=1, T=1500, decay=True, segments=True,
          normalize=1e-6),
    Shape('short', 24, 6, T=100, decay=True, segments=True),
    Shape('decode', T=1, segments=True, normalize=1e-6),
)
# Each takes seconds: the rows that every chip is tried with.
EVERYWHERE = ('H128', 'everything', 'float32-H256')


@pytest.fixture
def interpreted(capfd):
  """Runs TPU kernels on the CPU, and fails the test on a race."""
  with accelerators.tpu_interpreter(capfd):
    yield


# Of two heads of float32: chunks of 32, two a block.
SMALL = dict(chunk=32, rows=2 * 2 * 32 * 2)


@pytest.fixture
def small_blocks(monkeypatch):
  """257 steps make five blocks."""
  monkeypatch.setattr(
      blocks, 'sizes', functools.partial(blocks.sizes, **SMALL))
  # What other tests traced has other blocks.
  test_chunked.op.cache_clear()
  yield
  test_chunked.op.cache_clear()


def compare(time, options, decay, normalize, tolerance=2e-6):
  arguments = example(
      time, options, decay=decay, normalized=normalize is not None)
  assert_agree(
      run(test_chunked.op('tpu'), arguments, normalize=normalize),
      run(reference.chunked_linear_attention, arguments, normalize=normalize),
      tolerance)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize('time, options, decay, normalize', [
    pytest.param(63, (), None, None, id='T63-bare'),
    pytest.param(100, EVERYTHING, 'step', 1e-6, id='T100-everything'),
    slow(1, EVERYTHING, 'step', 1e-6, id='T1-everything'),
    slow(1, STATE, None, None, id='T1-linear'),
    slow(63, STATE, None, 1e-6, id='T63-normalized'),
    slow(63, EVERYTHING, 'head', None, id='T63-packed-head-decay'),
    slow(100, EVERYTHING, None, None, id='T100-packed'),
    slow(100, EVERYTHING, None, 1e-6, id='T100-packed-normalized'),
    slow(100, STATE, 'step', None, id='T100-step-decay'),
    slow(257, STATE, 'head', 1e-6, id='T257-head-decay'),
])
def test_matches_reference(
    time, options, decay, normalize, interpreted, small_blocks):
  compare(time, options, decay, normalize)


@pytest.mark.slow
@pytest.mark.parametrize('time, options, decay, normalize', [
    pytest.param(257, EVERYTHING, 'step', 1e-6, id='T257-everything'),
    pytest.param(1024, STATE, 'step', 1e-6, id='T1024-one-document'),
])
def test_matches_reference_in_chunks_of_128(
    time, options, decay, normalize, interpreted):
  compare(time, options, decay, normalize)


@pytest.mark.slow
def test_heads_that_share_a_state_in_several_programs(
    interpreted, small_blocks, monkeypatch):
  """Four query heads of a key head, two of them in a program."""
  arguments = example(100, STATE, decay='step', normalized=True)
  for name in ('k', 'v', 'decay'):
    arguments[name] = arguments[name][:, :, :1]
  arguments['s0'] = tuple(state[:, :1] for state in arguments['s0'])
  monkeypatch.setattr(
      blocks, 'sizes', functools.partial(blocks.sizes, rows=2 * 32 * 2))
  assert blocks.sizes(100, 4, widest=8, itemsize=4).heads == 2
  assert_agree(
      run(test_chunked.op('tpu'), arguments, normalize=1e-6),
      run(reference.chunked_linear_attention, arguments, normalize=1e-6))


@pytest.mark.slow
def test_extreme_decays(interpreted, small_blocks):
  test_chunked.test_extreme_decays('tpu')


@pytest.mark.slow
@pytest.mark.parametrize('case', [
    test_chunked.test_low_precision_inputs_keep_a_float32_state,
    test_chunked.test_a_start_at_the_first_step_decides_whether_s0_counts,
    test_chunked.test_handing_the_state_on_equals_the_whole,
    functools.partial(
        test_chunked.test_documents_are_isolated_bit_for_bit, length=25),
    test_chunked.test_the_same_bits_twice,
], ids=['low-precision', 'first-start', 'handing-on', 'isolated', 'same-bits'])
def test_as_every_implementation(case, interpreted, small_blocks):
  case('tpu')


@pytest.mark.parametrize('garbage', [
    pytest.param(np.nan, id='nan', marks=pytest.mark.slow),
    pytest.param(np.inf, id='inf')])
def test_documents_are_isolated_from_garbage(
    garbage, interpreted, small_blocks):
  """In the same chunk, in other chunks and in the state between them."""
  arguments = example(100, STATE, decay='step', normalized=True)
  arguments['starts'] = oracle.starts(25, 25, 25, 25)
  changed = dict(arguments)
  for name in ('q', 'k', 'v'):
    changed[name] = arguments[name].at[:, 25:50].set(garbage)
  changed['decay'] = arguments['decay'].at[:, 25:50].set(
      np.nan if np.isnan(garbage) else -np.inf)
  before, after = (run(test_chunked.op('tpu'), a, normalize=1e-6)
                   for a in (arguments, changed))
  assert not np.isfinite(after['y'][:, 25:50]).any()
  for name in ('y', 'dq', 'dk', 'dv', 'ddecay'):
    for other in (slice(0, 25), slice(50, 100)):
      assert oracle.same_bits(before[name][:, other], after[name][:, other])
  for name in ('sT', 'sT1', 'ds0', 'ds01'):
    assert oracle.same_bits(before[name], after[name]), name


@pytest.mark.slow
@pytest.mark.parametrize('decay, normalize', [
    (None, None), (None, 1e-6), ('step', None), ('step', 1e-6),
], ids=['plain', 'normalized', 'decay', 'everything'])
def test_bfloat16_error(decay, normalize, interpreted, small_blocks,
                        monkeypatch):
  """Within twice what rounding the inputs and outputs alone costs.

  Though S, dS and the weights are rounded too, where a product takes them.
  """
  monkeypatch.setattr(test_chunked, 'WIDTH', 64)
  monkeypatch.setattr(test_chunked, 'VALUE', 64)
  arguments = example(
      200, STATE, decay=decay, normalized=normalize is not None)
  series = {name: arguments.pop(name) for name in ('q', 'k', 'v')}
  dy = jax.random.normal(jax.random.key(0), series['q'].shape)

  def results(op, series, dy):
    def weighed(arrays):
      y, state = op(**arrays, normalize=normalize)
      return y, jax.tree.map(lambda x: x * 1, state)

    (y, state), pull = jax.vjp(weighed, dict(series, **arguments))
    dstate = jax.tree.map(jnp.ones_like, state)
    gradients, = pull((dy, dstate))
    return dict(y=y, sT=state, **{f'd{n}': g for n, g in gradients.items()})

  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (series, dy))
  full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  actual = results(test_chunked.op('tpu'), *half)
  exact, rounded = (
      results(reference.chunked_linear_attention, *inputs)
      for inputs in ((series, dy), full))
  rounded = jax.tree.map(lambda r, a: r.astype(a.dtype), rounded, actual)
  for name, want in exact.items():
    for a, r, e in zip(*map(jax.tree.leaves, (
        actual[name], rounded[name], want))):
      error, allowed = (oracle.relative_rms(x, e) for x in (a, r))
      assert error <= 2 * allowed, f'{name}: {error:.1e} against {allowed:.1e}'


@pytest.mark.parametrize('change, message', [
    (dict(q=jnp.bfloat16), 'the same for all'),
    (dict(q=jnp.float16, k=jnp.float16, v=jnp.float16), 'float16'),
    (dict(width=272), '272'),
], ids=['dtypes', 'dtype', 'width'])
def test_declines(change, message):
  shape = 1, 64, 1, change.get('width', 16)
  q, k, v = (jax.ShapeDtypeStruct(shape, change.get(name, jnp.float32))
             for name in 'qkv')
  attend = functools.partial(chunked_linear_attention, implementation='tpu')
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attend, q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize('chip, shape', [
    pytest.param(chip, shape, id=f'{chip}-{shape.id}')
    for chip in CHIPS for shape in SHAPES
    if chip == 'v5e' or shape.id in EVERYWHERE])
def test_compiles(chip, shape):
  device = accelerators.tpu(chip)
  struct = functools.partial(
      jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
  B, (_, H, V, T, N, K, *_) = 2, shape
  arrays = dict(
      q=struct((B, T, N, H), shape.dtype), k=struct((B, T, K, H), shape.dtype),
      v=struct((B, T, K, V), shape.dtype),
      s0=struct((B, K, H, V), jnp.float32))
  if shape.normalize is not None:
    arrays['s0'] = arrays['s0'], struct((B, K, H), jnp.float32)
  if shape.decay:
    arrays['decay'] = struct((B, T, K), jnp.float32)

  def loss(arrays, ids):
    outputs = chunked_linear_attention(
        **arrays, starts=ids if shape.segments else None,
        normalize=shape.normalize, implementation='tpu')
    return sum(jnp.sum(x.astype(jnp.float32) ** 2)
               for x in jax.tree.leaves(outputs))

  compiled = jax.jit(jax.grad(loss)).lower(
      arrays, struct((B, T), bool)).compile()
  assert f'{T},{T}]' not in compiled.as_text()
  widest = padded_width(max(H, V))
  assert oracle.largest_buffer(compiled) <= B * max(
      T * N * widest, 2 * K * widest**2)


@pytest.mark.slow
def test_compiles_in_a_step_of_64_chips():
  devices = accelerators.tpu_pod(8, 8)
  mesh = Mesh(devices, ('data', 'tensor'))
  series, sums = P('data', None, 'tensor'), P('data', 'tensor')
  attend = jax.shard_map(
      lambda q, k, v, S, z, starts: chunked_linear_attention(
          q, k, v, s0=(S, z), starts=starts,
          normalize=1e-6, implementation='tpu'),
      mesh=mesh, in_specs=(series,) * 3 + (sums,) * 2 + (P('data'),),
      out_specs=(series, (sums, sums)), check_vma=False)

  def step(weights, x, S, z, starts):
    def loss(weights):
      heads = (8, 2048, 16, 128)
      q, k, v = (jnp.reshape(x @ w, heads) for w in weights)
      y, state = attend(jax.nn.relu(q), jax.nn.relu(k), v, S, z, starts)
      return jnp.sum(y.astype(jnp.float32) ** 2), state
    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
    return value, state, jax.tree.map(lambda w, g: w - g, weights, gradient)

  struct = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
  weights = [struct((256, 16 * 128), jnp.bfloat16, None, 'tensor')] * 3
  compiled = jax.jit(step).lower(
      weights, struct((8, 2048, 256), jnp.bfloat16, 'data'),
      struct((8, 16, 128, 128), jnp.float32, 'data', 'tensor'),
      struct((8, 16, 128), jnp.float32, 'data', 'tensor'),
      struct((8, 2048), bool, 'data')).compile()
  assert '2048,2048]' not in compiled.as_text()
