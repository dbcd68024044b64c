"""Flash attention: its limits, how its kernels cut their work, its errors.

What all implementations promise is in test_contract.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels import dispatch
from attention.kernels.flash import (
    Operands,
    Rule,
    cudnn,
    flash_attention,
    gpu,
)
from attention.kernels.flash.gpu import blocks as gpu_blocks
from attention.kernels.flash.gpu import launch
from attention.kernels.flash.tpu import blocks
from tests.kernels import accelerators, implementations, ops
from tests.kernels.measure import assert_agree, relative_rms
from tests.kernels.ops import Flash

INTERPRETED = [
    pytest.param('tpu', marks=pytest.mark.slow),
    pytest.param('gpu', marks=[
        pytest.mark.slow, accelerators.gpu_interpreter_exists])]


@pytest.mark.parametrize('implementation', ['xla', 'plain', *INTERPRETED])
def test_huge_scores_stay_finite(implementation, results):
  row = Flash(has='sink')
  operands = row.arguments(implementations.dtype(row, implementation))
  operands['q'] *= 1e4
  got = results(row, implementation, operands)
  assert all(np.all(np.isfinite(np.float32(x))) for x in got.values())
  want = ops.defined(row, operands)
  for name in row.outputs:
    assert relative_rms(got[name], want[name]) <= 1e-3


@pytest.mark.parametrize('implementation', ['xla', 'plain'])
@pytest.mark.parametrize('row, values', [
    pytest.param(Flash(has='sink'), dict(sink=-np.inf), id='sink'),
    pytest.param(Flash(window=63), {}, id='window'),
    pytest.param(Flash(softcap=1e6), {}, id='softcap'),
    pytest.param(Flash(has='q_ids kv_ids'), dict(q_ids=0, kv_ids=0),
                 id='segments'),
])
def test_limit_is_softmax(row, values, implementation, results):
  softmax = results(Flash(), implementation, Flash().arguments(jnp.float32))
  limit = row.arguments(jnp.float32) | Flash().arguments(jnp.float32)
  limit |= {name: jnp.full_like(limit[name], x) for name, x in values.items()}
  assert_agree(results(row, implementation, limit), softmax, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('softcap', [50.0, 60.0])
def test_softcap_is_exact_at_both_ends(softcap, results):
  """With the maximum that is known up to 50, and the one that is found."""
  row = Flash(softcap=softcap, N=2, K=1)
  operands = row.arguments(jnp.float32)
  # Every score is at the lower bound, but for a fifth at the upper one.
  k = -jnp.abs(operands['k'])
  operands |= dict(q=jnp.abs(operands['q']) * 1e4, k=k.at[:, 3::5].multiply(-1))
  assert_agree(results(row, 'tpu', operands), ops.defined(row, operands))


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


@pytest.mark.parametrize('T, options, listed', [
    (1024, {}, 36),
    (1024, {'causal': False}, 64),
    (1024, {'window': 128}, 15),
    (1024, {'window': 129}, 15),
    (1024, {'window': 130}, 21),
    (1024, {'q_offset': -512}, 4 + 10),
], ids=['causal', 'all', 'window128', 'window129', 'window130', 'late'])
def test_visits_only_what_the_mask_leaves(T, options, listed, on_tpu):
  options = {'causal': True, 'window': 0, 'q_offset': 0, **options}
  visits = blocks.visits(
      blocks.Blocks(128, 128, 128, 128, 1), T, T, None, None,
      options.pop('q_offset'), **options)
  assert visits.steps == visits.words.shape[1] == listed


@pytest.mark.parametrize('order', ['sorted', 'interleaved'])
def test_packed_documents_do_not_visit_each_other(order, on_tpu):
  ids = np.repeat(np.arange(4), 256)
  if order == 'interleaved':
    ids = np.repeat([0, 1, 0, 1, 2, 2, 3, 3], 128)
  ids = np.asarray(ids, np.int32)[None]
  words, steps = jax.jit(lambda ids: blocks.visits(
      blocks.Blocks(128, 128, 128, 128, 1), 1024, 1024, ids, ids, 0,
      causal=True, window=0)[:2])(ids)
  rows, columns, kind, first, last = blocks.unpack(
      np.asarray(words)[0, :int(steps)])
  assert steps == 4 * 3
  np.testing.assert_array_equal(ids[0, ::128][rows], ids[0, ::128][columns])
  assert np.sum(kind == blocks.FULL) == 4
  assert np.sum(first) == np.sum(last) == 8


def test_fully_visible_blocks_take_no_mask_and_empty_ones_no_time():
  plan = launch.Plan(
      Rule(0.1, window=384), segments=True, S=1024, G=1, block=128, stages=2)
  ids = np.repeat(np.arange(2), 512)[None]
  q = np.zeros((1, 1024, 1, 64), np.float32)
  spans = jax.jit(lambda *arrays: gpu_blocks.query_spans(
      plan, Operands(*arrays, 0))['spans'][0])(q, q, q, ids, ids)
  spans = gpu_blocks.Span(*np.moveaxis(np.asarray(spans), -1, 0))
  np.testing.assert_array_equal(spans.start, [0, 0, 0, 0, 4, 4, 4, 4])
  np.testing.assert_array_equal(spans.stop, np.arange(1, 9))
  full = [list(range(a, b)) for a, b in zip(spans.full_start, spans.full_stop)]
  assert full == [[], [0], [0, 1], [1, 2], [], [4], [4, 5], [5, 6]]


def test_cudnn_gets_an_output_with_the_delta_asked_for():
  random = np.random.default_rng(0)
  dout = jnp.asarray(random.normal(size=(2, 5, 3, 64)), jnp.bfloat16)
  delta = jnp.asarray(random.normal(size=(2, 3, 5)), jnp.float32)
  output_of = jax.jit(cudnn._output_of)
  out = np.float32(output_of(dout, delta))
  product = np.sum(out * np.float32(dout), -1)
  np.testing.assert_allclose(
      product.swapaxes(1, 2), delta, atol=3e-3, rtol=3e-3)
  silent = np.float32(output_of(0 * dout, delta.at[0].set(0.0)))
  assert np.all(silent[0] == 0) and np.all(np.isnan(silent[1]))


@pytest.mark.parametrize('shape, dtype, message', [
    ((1, 64, 1, 16), jnp.float16, 'float16'),
    ((1, 64, 1, 272), jnp.bfloat16, '272'),
    ((1, 1 << 19, 1, 64), jnp.bfloat16, 'shard'),
], ids=['dtype', 'width', 'length'])
def test_tpu_declines(shape, dtype, message, on_tpu):
  q = jax.ShapeDtypeStruct(shape, dtype)
  attend = functools.partial(flash_attention, scale=1.0, implementation='tpu')
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attend, q, q, q)


@pytest.mark.parametrize('target', [('tpu', 'v5p'), ('gpu', '9.0')], ids=str)
def test_auto_falls_back_where_a_kernel_has_no_bias(target):
  q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
  number = jax.ShapeDtypeStruct((1, 64, 2, 1), jnp.float32)
  with dispatch.pretend(*target), dispatch.record() as choices:
    jax.eval_shape(lambda q, *bias: flash_attention(
        q, q, q, scale=1.0, bias=bias), q, number, number)
  (name, note), = choices['attention.kernels.flash'].items()
  assert name == 'xla' and f'{target[0]} has no bias of the scores' in note


@pytest.mark.parametrize('options, reason', [
    (dict(q=jnp.zeros((1, 8, 2, 64))), 'float32'),
    (dict(v=jnp.zeros((1, 8, 1, 24), jnp.bfloat16)), 'V that 16 divides'),
    (dict(scale=-1.0), 'scale'),
    (dict(row_bias=jnp.zeros((1, 8, 2, 1))), 'gpu has no bias'),
], ids=['float32', 'narrow', 'negative', 'bias'])
def test_gpu_declines(options, reason, on_h100):
  q, k, v = (jnp.zeros((1, 8, n, 64), jnp.bfloat16) for n in (2, 1, 1))
  options = dict(q=q, k=k, v=v, scale=0.1) | options
  scale = options.pop('scale')
  with pytest.raises(NotImplementedError, match=reason):
    gpu.check(Operands(**options, q_ids=None, kv_ids=None, q_offset=0),
              Rule(scale))


@pytest.mark.parametrize('options, message', [
    ({'window': 3, 'causal': False}, 'window'),
    ({'window': -1}, 'window'),
    ({'softcap': -1.0}, 'softcap'),
    ({'sink': np.zeros(3, np.float32)}, 'sink'),
    ({'bias': (np.zeros((2, 63, 4, 1)), np.zeros((2, 63, 2, 1)))}, 'bias'),
    ({'segment_ids': np.zeros((2, 5), np.int32)}, 'segment_ids'),
    ({'implementation': 'cuda'}, 'implementation'),
    ({'k': np.zeros((2, 63, 3, 16), np.float32),
      'v': np.zeros((2, 63, 3, 16), np.float32)}, 'heads'),
    ({'v': np.zeros((2, 62, 2, 16), np.float32)}, 'v '),
    ({'v': np.zeros((2, 63, 2, 16), np.float16)}, 'dtype'),
], ids=lambda x: x if isinstance(x, str) else '')
def test_bad_arguments_raise(options, message):
  options = Flash().arguments(jnp.float32) | {'scale': 0.3} | options
  with pytest.raises(ValueError, match=message):
    flash_attention(**options)


def test_auto_is_xla_on_a_cpu_and_is_recorded():
  q = jax.ShapeDtypeStruct((2, 8, 2, 16), jnp.float32)
  with dispatch.record() as choices:
    jax.eval_shape(functools.partial(flash_attention, scale=0.3), q, q, q)
  assert choices == {'attention.kernels.flash': {'xla': ''}}
