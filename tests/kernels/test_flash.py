"""Every implementation of flash_attention against the reference, row by row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attention.kernels import dispatch
from attention.kernels.flash import flash_attention, reference, xla
from tests.kernels import oracle

# A backend that can run here, natively or interpreted, adds its name.
IMPLEMENTATIONS = ('xla', 'plain')
NAMES = ('out', 'lse', 'dq', 'dk', 'dv', 'dsink')
SCALE = 0.3


class Row(NamedTuple):
  """One case. T x S queries and keys, N and K heads, widths H and V."""
  id: str
  T: int = 63
  S: int | None = None
  N: int = 4
  K: int = 2
  H: int = 16
  V: int = 16
  causal: bool = True
  window: int = 0
  softcap: float = 0.0
  segments: bool = False
  sink: bool = False
  q_offset: int = 0
  traced: bool = False


ROWS = (
    Row('one token', T=1),
    Row('plain causal'),
    Row('T100', T=100),
    Row('T257', T=257),
    Row('bidirectional', causal=False),
    Row('multi-query', K=1),
    Row('multi-head', K=4),
    Row('one head', N=1, K=1),
    Row('wide values', V=24),
    Row('narrow values', H=24, V=8),
    Row('window 1', window=1),
    Row('window', window=9),
    Row('softcap', softcap=2.0),
    Row('segments', segments=True),
    Row('sink', sink=True),
    Row('window softcap', window=9, softcap=2.0),
    Row('window segments', window=9, segments=True),
    Row('window sink', window=9, sink=True),
    Row('softcap segments', softcap=2.0, segments=True),
    Row('softcap sink', softcap=2.0, sink=True),
    Row('segments sink', segments=True, sink=True),
    Row('everything', T=100, V=24, window=9, softcap=2.0, segments=True,
        sink=True),
    Row('everything T257', T=257, K=1, window=40, softcap=2.0, segments=True,
        sink=True),
    Row('bidirectional everything', V=24, causal=False, softcap=2.0,
        segments=True, sink=True),
    Row('chunk', T=63, S=100, q_offset=37),
    Row('chunk traced', T=63, S=100, q_offset=37, traced=True),
    Row('chunk window', T=63, S=257, window=70, q_offset=150, sink=True),
    Row('chunk window traced', T=63, S=257, window=70, q_offset=150, sink=True,
        traced=True),
    Row('cross', T=100, S=63, causal=False),
    Row('decode', T=1, S=257, q_offset=200, traced=True, sink=True),
    Row('decode window', T=3, S=257, q_offset=200, traced=True, window=30),
    Row('empty rows', T=63, S=100, q_offset=-20, sink=True),
    Row('empty rows traced', T=63, S=100, q_offset=-20, traced=True),
    Row('empty rows window', T=100, S=63, q_offset=5, window=9),
    Row('all rows empty', T=63, q_offset=-100, sink=True),
)
LONG_ROWS = (
    Row('causal', T=257),
    Row('everything', T=257, V=24, window=100, softcap=2.0, segments=True,
        sink=True),
    Row('grouped window', T=257, K=1, window=70),
    Row('bidirectional', T=100, S=257, causal=False, sink=True),
    Row('chunk', T=100, S=257, q_offset=100, window=150),
    Row('chunk traced', T=100, S=257, q_offset=100, window=150, traced=True),
    Row('empty rows traced', T=257, S=100, q_offset=-70, traced=True,
        sink=True),
    Row('decode', T=3, S=257, q_offset=180, window=90, traced=True),
    Row('decode segments', T=1, S=257, q_offset=256, segments=True, sink=True),
)
rows = functools.partial(
    pytest.mark.parametrize, 'row', ids=lambda row: row.id.replace(' ', '-'))
implementations = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def make(row, dtype=np.float32):
  """Arguments (q, k, v, q_ids, kv_ids, sink, q_offset) and cotangents."""
  random = np.random.default_rng(0)
  B, T, S = 2, row.T, row.S or row.T
  normal = lambda *shape: (
      random.normal(size=shape).astype(np.float32).astype(dtype))
  q = normal(B, T, row.N, row.H)
  k, v = normal(B, S, row.K, row.H), normal(B, S, row.K, row.V)
  # A mean, so that the sum that is the sink's gradient does not cancel.
  v += dtype(0.5)
  dout = normal(B, T, row.N, row.V) + dtype(1)
  dlse = normal(B, row.N, T)
  q_ids = kv_ids = None
  if row.segments:
    ids = np.sort(random.integers(0, 4, (B, max(T, S))), axis=1)
    q_ids, kv_ids = ids[:, -T:].astype(np.int32), ids[:, :S].astype(np.int32)
  sink = normal(row.N) if row.sink else None
  offset = np.int32(row.q_offset) if row.traced else None
  return (q, k, v, q_ids, kv_ids, sink, offset), (dout, dlse)


def run(row, op, arguments, cotangents, scale=SCALE):
  def call(q, k, v, q_ids, kv_ids, sink, q_offset):
    return op(
        q, k, v, scale=scale, causal=row.causal, window=row.window,
        softcap=row.softcap, sink=sink,
        segment_ids=None if q_ids is None else (q_ids, kv_ids),
        q_offset=row.q_offset if q_offset is None else q_offset)

  return outputs_and_gradients(call, arguments, cotangents)


def outputs_and_gradients(op, arguments, cotangents):
  """The outputs of op(*arguments), then the gradients of what is floating."""
  floating = [i for i, x in enumerate(arguments)
              if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]

  @jax.jit
  def both(arguments, cotangents):
    def of_floating(*values):
      full = list(arguments)
      for i, value in zip(floating, values, strict=True):
        full[i] = value
      return op(*full)

    outputs, pull = jax.vjp(of_floating, *(arguments[i] for i in floating))
    return *outputs, *pull(cotangents)

  return both(list(arguments), cotangents)


@functools.cache
def expected(row):
  """The reference in float64, so that errors are the implementation's own."""
  with jax.enable_x64(True):
    return run(row, reference.attention, *make(row, np.float64))


def through(implementation):
  return functools.partial(flash_attention, implementation=implementation)


def compare(row, implementation, tolerance=2e-6):
  actual = run(row, through(implementation), *make(row))
  for name, a, e in zip(NAMES, actual, expected(row)):
    empty = np.isneginf(e)
    np.testing.assert_array_equal(np.isneginf(a), empty)
    error = oracle.relative_rms(np.where(empty, 0, a), np.where(empty, 0, e))
    assert error <= tolerance, f'{name}: {error:.1e}'


def cut_small(monkeypatch):
  """Makes xla cut short sequences into several tiles, with ragged ends."""
  monkeypatch.setattr(xla, 'ROWS', 96)
  monkeypatch.setattr(xla, 'COLUMNS', 32)
  monkeypatch.setattr(xla, 'UNCUT_SCORES', 0)
  monkeypatch.setattr(xla, 'DECODE_KEYS', 32)


@implementations
@rows(argvalues=ROWS)
def test_matches_reference(row, implementation):
  compare(row, implementation)


@implementations
def test_huge_scores_stay_finite(implementation):
  row = Row('', sink=True)
  (q, *others), cotangents = make(row)
  arguments = (q * np.float32(1e4), *others)
  actual = run(row, through(implementation), arguments, cotangents)
  assert all(np.all(np.isfinite(x)) for x in actual)
  wanted = run(row, reference.attention, arguments, cotangents)
  for a, e in zip(actual[:2], wanted):
    assert oracle.relative_rms(a, e) <= 1e-3


@rows(argvalues=LONG_ROWS)
def test_xla_tiles_match_reference(row, monkeypatch):
  cut_small(monkeypatch)
  compare(row, 'xla')


@implementations
def test_same_bits_twice(implementation):
  row = Row('', T=100, window=9, softcap=2.0, segments=True, sink=True)
  first, second = (run(row, through(implementation), *make(row))
                   for _ in range(2))
  for a, b in zip(first, second):
    np.testing.assert_array_equal(a, b)


@implementations
@pytest.mark.parametrize('limit, options', [
    ('sink', {'sink': np.full(4, -np.inf, np.float32)}),
    ('window', {'window': 63}),
    ('softcap', {'softcap': 1e6}),
    ('segments', {'segment_ids': np.zeros((2, 63), np.int32)}),
], ids=lambda x: x if isinstance(x, str) else '')
def test_limit_is_softmax(limit, options, implementation):
  del limit
  (q, k, v, *_), (dout, dlse) = make(Row(''))
  op = functools.partial(through(implementation), scale=SCALE)
  limits = outputs_and_gradients(
      functools.partial(op, **options), (q, k, v), (dout, dlse))
  softmax = outputs_and_gradients(op, (q, k, v), (dout, dlse))
  for name, a, e in zip(NAMES, limits, softmax):
    assert oracle.relative_rms(a, e) <= 1e-6, name


@implementations
def test_bfloat16_is_close_to_float32(implementation):
  row = Row('', T=100, window=40, sink=True)
  (*arrays, q_ids, kv_ids, sink, offset), (dout, dlse) = make(row)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (*arrays, dout)]
  full = [np.asarray(x, np.float32) for x in half]
  results = [
      run(row, through(implementation),
          (q, k, v, q_ids, kv_ids, sink, offset), (d, dlse))
      for q, k, v, d in (half, full)]
  assert results[0][0].dtype == jnp.bfloat16
  assert results[0][1].dtype == jnp.float32
  for name, a, e in zip(NAMES, *results):
    assert oracle.relative_rms(a, e) <= 8e-3, name


@pytest.mark.parametrize('transformation', [
    'checkpoint', 'scan', 'vmap', 'shard_map'])
@pytest.mark.parametrize('implementation', [*IMPLEMENTATIONS, 'tiles'])
def test_composes_with(transformation, implementation, monkeypatch):
  if implementation == 'tiles':
    implementation = 'xla'
    cut_small(monkeypatch)
  (q, k, v, _, _, sink, _), _ = make(Row('', sink=True))

  def loss(q, k, v, sink):
    out, lse = flash_attention(
        q, k, v, scale=SCALE, sink=sink, implementation=implementation)
    return jnp.sum(out ** 2) + jnp.sum(lse)

  def mapped(q, k, v, sink):
    one = lambda *x: loss(*(a[None] for a in x), sink)
    return jnp.sum(jax.vmap(one)(q, k, v))

  def scanned(q, k, v, sink):
    step = lambda total, x: (total + loss(*x, sink), None)
    return jax.lax.scan(step, 0.0, [x[:, None] for x in (q, k, v)])[0]

  mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2],
                       axis_types=(jax.sharding.AxisType.Auto,))
  sharded = jax.shard_map(
      lambda *x: jax.lax.psum(loss(*x), 'data'), mesh=mesh,
      in_specs=(P('data'), P('data'), P('data'), P()), out_specs=P())
  transformed = {'checkpoint': jax.checkpoint(loss), 'scan': scanned,
                 'vmap': mapped, 'shard_map': sharded}[transformation]
  actual, wanted = (
      jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(q, k, v, sink)
      for f in (transformed, loss))
  for a, e in zip(actual, wanted):
    assert oracle.relative_rms(a, e) <= 1e-6


@pytest.mark.parametrize('T, options', [
    (2048, {}), (2048, {'causal': False}), (2048, {'window': 300}),
], ids=['causal', 'bidirectional', 'window'])
def test_xla_stores_no_score_matrix(T, options):
  q = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
  loss = lambda q, k, v: jnp.sum(
      flash_attention(q, k, v, scale=SCALE, implementation='xla',
                      **options)[0])
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
  assert f'{T},{T}' not in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * T


@pytest.mark.parametrize('options, message', [
    ({'window': 3, 'causal': False}, 'window'),
    ({'window': -1}, 'window'),
    ({'softcap': -1.0}, 'softcap'),
    ({'sink': np.zeros(3, np.float32)}, 'sink'),
    ({'segment_ids': np.zeros((2, 5), np.int32)}, 'segment_ids'),
    ({'implementation': 'cuda'}, 'implementation'),
    ({'k': np.zeros((2, 63, 3, 16), np.float32),
      'v': np.zeros((2, 63, 3, 16), np.float32)}, 'heads'),
    ({'v': np.zeros((2, 62, 2, 16), np.float32)}, 'v '),
    ({'v': np.zeros((2, 63, 2, 16), np.float16)}, 'dtype'),
], ids=lambda x: x if isinstance(x, str) else '')
def test_bad_arguments_raise(options, message):
  (q, k, v, *_), _ = make(Row(''))
  options = {'q': q, 'k': k, 'v': v, 'scale': SCALE, **options}
  arrays = [options.pop(name) for name in 'qkv']
  with pytest.raises(ValueError, match=message):
    flash_attention(*arrays, **options)


def test_auto_is_xla_on_a_cpu_and_is_recorded():
  (q, k, v, *_), _ = make(Row(''))
  with dispatch.record() as choices:
    flash_attention(q, k, v, scale=SCALE)
  assert choices == {'attention.kernels.flash': {'xla': ''}}
