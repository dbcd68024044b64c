"""The TPU kernels: the rows of test_flash interpreted, and compiled for chips.

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

from attention.kernels import dispatch
from attention.kernels.flash import flash_attention
from attention.kernels.flash.tpu import blocks
from attention.kernels.mosaic_tpu import CHIPS
from tests.kernels import accelerators, oracle, test_flash
from tests.kernels.test_flash import LONG_ROWS, ROWS, Row

pytestmark = pytest.mark.usefixtures('on_tpu')

# The fast tier: several blocks, each kind of block, each way to list them.
FAST_ROWS = (
    Row('everything', T=257, K=1, V=24, window=100, softcap=2.0, segments=True,
        sink=True),
    Row('chunk', T=100, S=257, q_offset=128),
    Row('empty rows traced', T=200, S=100, q_offset=-70, traced=True,
        sink=True),
    Row('decode', T=3, S=257, q_offset=180, window=90, traced=True),
    Row('bidirectional traced', T=63, S=128, causal=False, traced=True),
)


class Shape(NamedTuple):
  """A row of the table of what the compilers must take."""
  id: str
  H: int = 128
  V: int = 128
  T: int = 1024
  S: int = 1024
  dtype: type = jnp.bfloat16
  segments: bool = False
  traced: bool = False
  options: dict = {}


SHAPES = (
    Shape('H32', 32, 32),
    Shape('H64', 64, 64),
    Shape('H80', 80, 80),
    Shape('H96', 96, 96),
    Shape('H128'),
    Shape('H192V128', 192, 128),
    Shape('H256', 256, 256),
    Shape('float32', dtype=jnp.float32),
    Shape('float32-H256', 256, 256, dtype=jnp.float32),
    Shape('everything', 64, 96, T=1000, S=1500, segments=True, traced=True,
          options={'window': 300, 'softcap': 30.0}),
    Shape('long', T=4096, S=4096),
    Shape('packed', segments=True, T=4096, S=4096),
    Shape('decode', T=1, S=4000, traced=True),
)
# The v4, which has the least VMEM, takes all; the others what has other blocks.
EVERYWHERE = 'H64', 'everything', 'long', 'packed'
TARGETS = [(chip, shape) for chip in CHIPS for shape in SHAPES
           if chip == 'v4' or shape.id in EVERYWHERE]
rows = functools.partial(
    pytest.mark.parametrize, 'row', ids=lambda row: row.id.replace(' ', '-'))


@pytest.fixture
def interpreted(capfd):
  """Runs TPU kernels on the CPU, and fails the test on a race."""
  with accelerators.tpu_interpreter(capfd):
    yield


def cut(monkeypatch, **options):
  """Has all work cut in blocks of 128, two tiles of scores ahead."""
  monkeypatch.setattr(
      blocks, 'sizes',
      lambda *_, **__: blocks.Blocks(128, 128, 128, 128, 2, **options))


@pytest.fixture
def small_blocks(monkeypatch):
  """257 tokens make nine blocks."""
  cut(monkeypatch)


def compare(row, **kwargs):
  test_flash.compare(row, 'tpu', **kwargs)


@rows(argvalues=FAST_ROWS)
def test_matches_reference(row, interpreted, small_blocks):
  compare(row)


def test_sums_by_the_matrix_unit(interpreted, monkeypatch):
  cut(monkeypatch, mxu_sums=True)
  compare(Row('', T=200, K=1, V=24, window=100, segments=True, sink=True))


@pytest.mark.slow
@rows(argvalues=ROWS + LONG_ROWS)
def test_matches_reference_on_all_rows(row, interpreted, small_blocks):
  compare(row)


@pytest.mark.slow
@rows(argvalues=(
    Row('blocks of the table', T=700, H=64, V=32),
    Row('packed blocks of the table', T=700, N=2, K=1, H=32, V=64, window=300,
        segments=True)))
def test_matches_reference_in_blocks_of_the_table(row, interpreted):
  compare(row)


@pytest.mark.slow
@pytest.mark.parametrize('H', [32, 80, 96, 192, 256])
def test_matches_reference_at_width(H, interpreted, small_blocks):
  # Scores are sums of H float32 products: at 256 their rounding shows in dq.
  compare(Row('', T=200, N=2, K=1, H=H, V=H // 2),
          tolerance=3e-6 if H == 256 else 2e-6)


@pytest.mark.slow
def test_keys_that_do_not_fit_in_vmem(interpreted, small_blocks, monkeypatch):
  monkeypatch.setattr(blocks, 'most_keys', lambda *_: 128)
  compare(Row('', T=257, K=1, window=150, segments=True, sink=True))


@pytest.mark.parametrize('chip', ['v5e', pytest.param(
    'v6e', marks=pytest.mark.slow)])
def test_bfloat16_error(chip, interpreted):
  """Within twice what rounding the inputs and outputs alone costs."""
  row = Row('', T=257, window=100, H=64, V=64, sink=True)
  (*arrays, q_ids, kv_ids, sink, offset), (dout, dlse) = test_flash.make(row)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (*arrays, dout)]
  with dispatch.pretend('tpu', chip):
    actual = test_flash.run(
        row, test_flash.through('tpu'),
        (*half[:3], q_ids, kv_ids, sink, offset), (half[3], dlse))
  exact = test_flash.expected(row)
  full = [np.asarray(x, np.float32) for x in half]
  rounded = test_flash.run(
      row, test_flash.reference.attention,
      (*full[:3], q_ids, kv_ids, sink, offset), (full[3], dlse))
  for name, a, r, e in zip(test_flash.NAMES, actual, rounded, exact):
    r = np.asarray(jnp.asarray(r, a.dtype), np.float32)
    error, allowed = oracle.relative_rms(a, e), oracle.relative_rms(r, e)
    assert error <= 2 * allowed, f'{name}: {error:.1e} against {allowed:.1e}'


@pytest.mark.slow
def test_same_bits_twice(interpreted, small_blocks):
  row = FAST_ROWS[0]
  first, second = (
      test_flash.run(row, test_flash.through('tpu'), *test_flash.make(row))
      for _ in range(2))
  for a, b in zip(first, second):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_huge_scores_stay_finite(interpreted, small_blocks):
  test_flash.test_huge_scores_stay_finite('tpu')


@pytest.mark.slow
@pytest.mark.parametrize('softcap', [50.0, 60.0])
def test_softcap_is_exact_at_both_ends(softcap, interpreted, small_blocks):
  """With the maximum that is known up to 50, and the one that is found."""
  row = Row('', softcap=softcap, N=2, K=1)
  (q, k, *others), cotangents = test_flash.make(row)
  # Every score is at the lower bound, but for a fifth at the upper one.
  q, k = np.abs(q) * np.float32(1e4), -np.abs(k)
  k[:, 3::5] *= -1
  arguments = (q, k, *others)
  actual = test_flash.run(
      row, test_flash.through('tpu'), arguments, cotangents)
  wanted = test_flash.run(
      row, test_flash.reference.attention, arguments, cotangents)
  for name, a, e in zip(test_flash.NAMES, actual, wanted):
    assert oracle.relative_rms(a, e) <= 2e-6, name


@pytest.mark.parametrize('T, options, expected', [
    (8192, {}, 1024), (1100, {}, 640), (700, {}, 768), (100, {}, 128),
    (4096, {'window': 500}, 512), (4096, {'window': 9}, 256),
    (4096, {'packed': True}, 512),
], ids=str)
def test_blocks_suit_the_length_and_the_mask(T, options, expected):
  with dispatch.pretend('tpu', 'v5e'):
    chosen = blocks.sizes(
        T, T, widest=128, itemsize=2, backward=False, **options)
  assert chosen.q == chosen.k == expected
  assert expected % chosen.tile_q == expected % chosen.tile_k == 0


@pytest.mark.slow
def test_composes_with_scan(interpreted, small_blocks, monkeypatch):
  """The interpreter's callbacks allow neither checkpoint nor vmap."""
  test_flash.test_composes_with('scan', 'tpu', monkeypatch)


@pytest.mark.parametrize('T, options, listed', [
    (1024, {}, 36),
    (1024, {'causal': False}, 64),
    (1024, {'window': 128}, 15),
    (1024, {'window': 129}, 15),
    (1024, {'window': 130}, 21),
    (1024, {'q_offset': -512}, 4 + 10),
], ids=['causal', 'all', 'window128', 'window129', 'window130', 'late'])
def test_visits_only_what_the_mask_leaves(T, options, listed):
  options = {'causal': True, 'window': 0, 'q_offset': 0, **options}
  visits = blocks.visits(
      blocks.Blocks(128, 128, 128, 128, 1), T, T, None, None,
      options.pop('q_offset'), **options)
  assert visits.steps == visits.words.shape[1] == listed


@pytest.mark.parametrize('order', ['sorted', 'interleaved'])
def test_packed_documents_do_not_visit_each_other(order):
  ids = np.repeat(np.arange(4), 256)
  if order == 'interleaved':
    ids = np.repeat([0, 1, 0, 1, 2, 2, 3, 3], 128)
  ids = jnp.asarray(ids, jnp.int32)[None]
  visits = blocks.visits(
      blocks.Blocks(128, 128, 128, 128, 1), 1024, 1024, ids, ids, 0,
      causal=True, window=0)
  rows, columns, kind, first, last = blocks.unpack(
      np.asarray(visits.words)[0, :int(visits.steps)])
  assert visits.steps == 4 * 3
  np.testing.assert_array_equal(ids[0, ::128][rows], ids[0, ::128][columns])
  assert np.sum(kind == blocks.FULL) == 4
  assert np.sum(first) == np.sum(last) == 8


@pytest.mark.parametrize('shape, dtype, message', [
    ((1, 64, 1, 16), jnp.float16, 'float16'),
    ((1, 64, 1, 272), jnp.bfloat16, '272'),
    ((1, 1 << 19, 1, 64), jnp.bfloat16, 'shard'),
], ids=['dtype', 'width', 'length'])
def test_declines(shape, dtype, message):
  q = jax.ShapeDtypeStruct(shape, dtype)
  attend = functools.partial(flash_attention, scale=1.0, implementation='tpu')
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attend, q, q, q)


@pytest.mark.slow
@pytest.mark.parametrize(
    'chip, shape', TARGETS, ids=lambda x: x if isinstance(x, str) else x.id)
def test_compiles(chip, shape):
  device = accelerators.tpu(chip)
  struct = functools.partial(
      jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
  q = struct((2, shape.T, 4, shape.H), shape.dtype)
  k = struct((2, shape.S, 2, shape.H), shape.dtype)
  v = struct((2, shape.S, 2, shape.V), shape.dtype)
  ids = [struct((2, n), jnp.int32) for n in (shape.T, shape.S)]

  def loss(q, k, v, ids, offset):
    out, lse = flash_attention(
        q, k, v, scale=0.1, segment_ids=ids if shape.segments else None,
        q_offset=offset if shape.traced else 0, implementation='tpu',
        **shape.options)
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

  with dispatch.pretend('tpu', chip):
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
        q, k, v, ids, struct((), jnp.int32)).compile()
  assert f'{shape.T},{shape.S}]' not in compiled.as_text()


@pytest.mark.slow
def test_compiles_in_a_step_of_64_chips():
  devices = accelerators.tpu_pod(8, 8)
  mesh = Mesh(devices, ('data', 'tensor'))
  spec = P('data', None, 'tensor')
  attend = jax.shard_map(
      lambda q, k, v, ids: flash_attention(
          q, k, v, scale=0.1, segment_ids=ids, implementation='tpu')[0],
      mesh=mesh, in_specs=(spec, spec, spec, P('data')), out_specs=spec,
      check_vma=False)

  def step(weights, x, ids):
    def loss(weights):
      heads = (8, 2048, 16, 128)
      q, k, v = (jnp.reshape(x @ w, heads) for w in weights)
      return jnp.sum(attend(q, k, v, ids).astype(jnp.float32) ** 2)
    value, gradient = jax.value_and_grad(loss)(weights)
    return value, jax.tree.map(lambda w, g: w - g, weights, gradient)

  struct = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
  weights = [struct((256, 16 * 128), jnp.bfloat16, None, 'tensor')] * 3
  with dispatch.pretend('tpu', 'v5p'):
    compiled = jax.jit(step).lower(
        weights, struct((8, 2048, 256), jnp.bfloat16, 'data'),
        struct((8, 2048), jnp.int32, 'data')).compile()
  assert '2048,2048]' not in compiled.as_text()
