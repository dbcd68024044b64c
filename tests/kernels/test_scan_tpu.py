"""The TPU scan: the rows of test_scan interpreted, and compiled for chips.

The interpreter runs with NaN in memory that nothing wrote, raises on reads
out of bounds, and can report races. The compiler is the real one: libtpu
builds for chips that are only described.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attention.kernels import scan
from attention.kernels.mosaic_tpu import CHIPS
from attention.kernels.scan import reference
from attention.kernels.scan.tpu import blocks
from tests.kernels import accelerators, oracle, test_scan
from tests.kernels.test_scan import assert_agree, example, op, run

pytestmark = pytest.mark.usefixtures('on_tpu')

ALL = ('z', 'dt_bias', 'h0', 'starts')


def cut(monkeypatch, **sizes):
  monkeypatch.setattr(
      blocks, 'sizes', functools.partial(blocks.sizes, **sizes))


@pytest.fixture
def interpreted(request, monkeypatch, capfd):
  """Runs TPU kernels on the CPU, in short strips: they compile faster.

  The parameter, if any, says whether to look for races, which takes long.
  """
  cut(monkeypatch, strip=8)
  jax.clear_caches()
  with accelerators.tpu_interpreter(
      capfd, races=getattr(request, 'param', False)):
    yield
  jax.clear_caches()


@pytest.fixture
def sizes(monkeypatch):
  """Sets how many rows, channels and states `example` makes."""
  def to(**values):
    for name, value in values.items():
      monkeypatch.setattr(test_scan, name.upper(), value)
  return to


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 128 channels of one row."""
  cut(monkeypatch, states=8 * 128)


def compare(arguments, **kwargs):
  got = run(op('tpu'), arguments, **kwargs)
  assert_agree(got, run(reference.selective_scan, arguments, **kwargs))


@pytest.mark.parametrize('interpreted', [True], indirect=True, ids=['races'])
def test_matches_reference(interpreted):
  compare(example(20, ALL))


def test_matches_reference_in_blocks(interpreted, sizes, small_blocks):
  """Several blocks of channels and chunks, none of them whole at the end."""
  sizes(batch=1, channels=200)
  compare(example(70, ('starts', 'h0')))


def test_bfloat16_error(interpreted):
  """Little more than what rounding the inputs and outputs costs."""
  arguments = example(20, ('z', 'dt_bias'), dtype=jnp.bfloat16)
  got = run(op('tpu'), arguments)
  assert got['y'].dtype == got['dx'].dtype == got['dB'].dtype == jnp.bfloat16
  assert got['hT'].dtype == got['dA'].dtype == jnp.float32
  exact = {name: value.astype(jnp.float32) for name, value in arguments.items()}
  exact = run(reference.selective_scan, exact)
  assert_agree({'hT': got['hT']}, {'hT': exact['hT']})
  rounded = run(reference.selective_scan, arguments)
  for name in exact:
    error, allowed = (
        oracle.relative_rms(x[name], exact[name]) for x in (got, rounded))
    assert error <= 1.2 * allowed + 2e-6, name


@pytest.mark.parametrize('change, message', [
    (dict(x=jnp.float16), 'x of dtype float16'),
    (dict(z=jnp.float16), 'z of dtype float16'),
], ids=['x', 'z'])
def test_declines_dtypes(change, message):
  arguments = example(10, ('z',))
  for name, dtype in change.items():
    arguments[name] = arguments[name].astype(dtype)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(op('tpu'), **arguments)


@pytest.mark.parametrize('E, M, message', [
    (128, 65, 'M .65.'), (1 << 20, 16, 'shard the channels')])
def test_declines_sizes(E, M, message):
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  arguments = dict(
      x=struct(1, 8, E), dt=struct(1, 8, E), A=struct(E, M),
      B=struct(1, 8, M), C=struct(1, 8, M), D=struct(E))
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(op('tpu'), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize('T, options', [
    (1, ALL), (63, ()), (100, ALL), (257, ('dt_bias', 'h0')),
    (1024, ('z', 'starts')),
], ids=['T1', 'T63', 'T100', 'T257', 'T1024'])
def test_matches_reference_at_length(T, options, interpreted, sizes):
  sizes(batch=1 if T == 1024 else 2)
  compare(example(T, options))


@pytest.mark.slow
@pytest.mark.parametrize('M', [8, 16, 20, 32, 64])
def test_matches_reference_with_states(M, interpreted, sizes):
  sizes(batch=1, channels=13, state=M)
  compare(example(40, ('z', 'h0', 'starts')))


@pytest.mark.slow
@pytest.mark.parametrize('interpreted', [True], indirect=True, ids=['races'])
def test_two_parts_of_channels(interpreted, sizes, small_blocks):
  """One row and four blocks: two halves of the channels for two cores."""
  sizes(batch=1, channels=500)
  compare(example(20, ('z', 'dt_bias', 'h0')))


@pytest.mark.slow
@pytest.mark.parametrize('case', [
    test_scan.test_steps_without_softplus,
    test_scan.test_a_start_at_the_first_step_decides_whether_h0_counts,
    test_scan.test_the_same_bits_twice,
    test_scan.test_extreme_steps,
    functools.partial(
        test_scan.test_documents_are_isolated_bit_for_bit, garbage=np.nan),
    functools.partial(
        test_scan.test_documents_are_isolated_bit_for_bit, garbage=np.inf),
], ids=['without-softplus', 'first-start', 'same-bits', 'extreme-steps',
        'isolated-from-nan', 'isolated-from-inf'])
def test_as_every_implementation(case, interpreted, sizes):
  case('tpu')


class Shape(NamedTuple):
  """A row of the table of what the compilers must take."""
  id: str
  T: int = 1000
  E: int = 1024
  M: int = 16
  B: int = 2
  dtype: type = jnp.bfloat16
  options: tuple = ()

  def operands(self, struct):
    series, shared = (self.B, self.T, self.E), (self.B, self.T, self.M)
    wide = lambda *shape: struct(shape, jnp.float32)
    return dict(
        x=struct(series, self.dtype), dt=struct(series, self.dtype),
        A=wide(self.E, self.M), B=struct(shared, self.dtype),
        C=struct(shared, self.dtype), D=wide(self.E),
        **{name: value for name, value in dict(
            z=struct(series, self.dtype), dt_bias=wide(self.E),
            h0=wide(self.B, self.E, self.M),
            starts=struct(series[:2], bool)).items()
           if name in self.options})


SHAPES = (
    Shape('long', T=2048, E=4096, options=('dt_bias',)),
    Shape('everything', options=ALL),
    Shape('float32', E=1000, B=1, dtype=jnp.float32, options=('z',)),
    Shape('narrow', T=100, E=256, M=64, options=('starts', 'z')),
    Shape('two-rows', E=200, B=4, options=('dt_bias', 'starts')),
    Shape('M8', E=2048, M=8, B=1),
    Shape('M32', M=32, B=1, options=ALL),
    Shape('wide', E=8192, M=64, B=1, dtype=jnp.float32, options=ALL),
    Shape('decode', T=1, E=1536, options=('dt_bias', 'h0')),
)


def weighed(arrays, ids):
  y, hT = scan.selective_scan(**arrays, **ids, implementation='tpu')
  return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(hT)


@pytest.mark.slow
@pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: shape.id)
@pytest.mark.parametrize('chip', CHIPS)
def test_compiles(chip, shape):
  device = accelerators.tpu(chip)
  arrays = shape.operands(functools.partial(
      jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device)))
  ids = {name: arrays.pop(name) for name in ('starts',) if name in arrays}
  compiled = jax.jit(jax.grad(weighed)).lower(arrays, ids).compile()
  states = shape.B * shape.T * shape.E * shape.M
  if shape.T > 1:
    assert oracle.largest_buffer(compiled) <= states // 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * states


@pytest.mark.slow
def test_compiles_in_a_step_of_64_chips():
  devices = accelerators.tpu_pod(8, 8)
  mesh = Mesh(devices, ('data', 'tensor'))
  series, shared = P('data', None, 'tensor'), P('data')
  split = jax.shard_map(
      lambda x, dt, A, B, C, D, ids: scan.selective_scan(
          x, dt, A, B, C, D, starts=ids, implementation='tpu')[0],
      mesh=mesh, in_specs=(series, series, P('tensor'), shared, shared,
                           P('tensor'), shared),
      out_specs=series, check_vma=False)

  def step(weights, x, ids):
    def loss(weights):
      inner, dt, A, B, C, D = weights
      y = split(x @ inner, x @ dt, A, x @ B, x @ C, D, ids)
      return jnp.sum(y.astype(jnp.float32) ** 2)
    value, gradient = jax.value_and_grad(loss)(weights)
    return value, jax.tree.map(lambda w, g: w - g, weights, gradient)

  struct = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
  half = functools.partial(struct, dtype=jnp.bfloat16)
  weights = (
      *[struct((256, 4096), jnp.bfloat16, None, 'tensor')] * 2,
      struct((4096, 16), jnp.float32, 'tensor'),
      half((256, 16)), half((256, 16)), struct((4096,), jnp.float32, 'tensor'))
  compiled = jax.jit(step).lower(
      weights, struct((8, 2048, 256), jnp.bfloat16, 'data'),
      struct((8, 2048), bool, 'data')).compile()
  assert oracle.largest_buffer(compiled) <= 2048 * 4096
