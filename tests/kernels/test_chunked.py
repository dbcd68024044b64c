"""Chunked linear attention against its definition, one step at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels import chunked
from attention.kernels.chunked import reference
from tests.kernels import oracle

IMPLEMENTATIONS = ('xla',)
TOLERANCE = 2e-6
BATCH, HEADS, GROUPS, WIDTH, VALUE = 2, 4, 2, 8, 6
SERIES = ('q', 'k', 'v', 'starts')


def example(time, options=(), *, decay=None, normalized=False,
            dtype=jnp.float32):
  """Arguments by name: the named optional ones, a decay by its kind."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  S = normal(BATCH, GROUPS, WIDTH, VALUE)
  z = np.abs(normal(BATCH, GROUPS, WIDTH))
  every = dict(
      q=normal(BATCH, time, HEADS, WIDTH), k=normal(BATCH, time, GROUPS, WIDTH),
      v=normal(BATCH, time, GROUPS, VALUE), s0=(S, z) if normalized else S,
      starts=oracle.random_starts(rng, BATCH, time, every=9))
  if normalized:
    # As a feature map leaves them: the denominator is a sum of positives.
    every.update(q=np.abs(every['q']) + 0.1, k=np.abs(every['k']) + 0.1)
  arguments = {name: jax.tree.map(jnp.asarray, value)
               for name, value in every.items()
               if name in options or name in ('q', 'k', 'v')}
  for name in ('q', 'k', 'v'):
    arguments[name] = arguments[name].astype(dtype)
  shape = dict(head=(GROUPS,), step=(BATCH, time, GROUPS)).get(decay)
  if shape:
    arguments['decay'] = jnp.asarray(-np.exp(normal(*shape) - 1))
  return arguments


def dot(tree):
  """A scalar that weighs every number of a tree differently."""
  rng = np.random.default_rng(1)
  return sum((leaf * rng.standard_normal(leaf.shape)).sum()
             for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0, static_argnames='normalize')
def run(op, arguments, normalize=None):
  """Outputs, final state and the gradient of every array, by name."""
  ids = {name: value for name, value in arguments.items() if name == 'starts'}
  arrays = {name: arguments[name] for name in set(arguments) - set(ids)}

  def weighed(arrays):
    outputs = op(**arrays, **ids, normalize=normalize)
    return dot(outputs), outputs

  (_, (y, sT)), gradients = jax.value_and_grad(weighed, has_aux=True)(arrays)
  results = dict(y=y, sT=sT, **{f'd{name}': gradients[name] for name in arrays})
  return {f'{name}{i or ""}': leaf for name, tree in results.items()
          for i, leaf in enumerate(jax.tree.leaves(tree))}


@functools.cache
def op(implementation):
  return jax.jit(
      functools.partial(
          chunked.chunked_linear_attention, implementation=implementation),
      static_argnames='normalize')


def assert_agree(got, want, tolerance=TOLERANCE):
  errors = {name: oracle.relative_rms(got[name], want[name]) for name in want}
  wrong = {name: e for name, e in errors.items() if not e <= tolerance}
  assert not wrong, wrong


EVERYTHING = ('s0', 'starts')


@pytest.mark.parametrize('time, options, decay, normalize', [
    pytest.param(1, EVERYTHING, 'step', 1e-6, id='T1-all'),
    pytest.param(63, (), None, None, id='T63-bare'),
    pytest.param(63, (), None, 1e-6, id='T63-normalized'),
    pytest.param(100, EVERYTHING, None, 1e-6, id='T100-linear'),
    pytest.param(100, EVERYTHING, 'step', None, id='T100-step-decay'),
    pytest.param(257, ('s0',), 'head', 1e-6, id='T257-head-decay'),
    pytest.param(257, EVERYTHING, 'step', 1e-6, id='T257-all'),
])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_matches_reference(implementation, time, options, decay, normalize):
  arguments = example(
      time, options, decay=decay, normalized=normalize is not None)
  assert_agree(
      run(op(implementation), arguments, normalize=normalize),
      run(reference.chunked_linear_attention, arguments, normalize=normalize))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_values_of_one_give_one(implementation):
  arguments = example(100, ('starts',), normalized=True)
  arguments['v'] = jnp.ones_like(arguments['v'])
  y, _ = op(implementation)(**arguments, normalize=1e-6)
  np.testing.assert_allclose(y, 1.0, rtol=1e-5)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_low_precision_inputs_keep_a_float32_state(implementation):
  arguments = example(63, ('s0',), dtype=jnp.bfloat16)
  got = run(op(implementation), arguments)
  assert got['y'].dtype == jnp.bfloat16
  assert got['sT'].dtype == jnp.float32
  want = run(reference.chunked_linear_attention, arguments)
  assert_agree({'sT': got['sT']}, {'sT': want['sT']})
  assert_agree(got, want, tolerance=5e-3)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_start_at_the_first_step_decides_whether_s0_counts(implementation):
  arguments = example(100, EVERYTHING, normalized=True)
  results = run(op(implementation), arguments, normalize=1e-6)
  for gradient in (results['ds0'], results['ds01']):
    assert np.any(gradient[0]), 'row 0 continues the document of s0'
    assert not np.any(gradient[1]), 'row 1 starts another document'


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_handing_the_state_on_equals_the_whole(implementation):
  arguments = example(
      100, ('starts',), decay='step', normalized=True)
  whole, end = op(implementation)(**arguments, normalize=1e-6)
  parts, state = [], None
  for start, stop in ((0, 63), (63, 64), (64, 100)):
    part = {name: value[:, start:stop] for name, value in arguments.items()}
    y, state = op(implementation)(**part, s0=state, normalize=1e-6)
    parts.append(y)
  assert_agree(dict(y=jnp.concatenate(parts, axis=1), S=state[0], z=state[1]),
               dict(y=whole, S=end[0], z=end[1]))


@pytest.mark.parametrize('length', [25, 75])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_documents_are_isolated_bit_for_bit(implementation, length):
  arguments = example(4 * length, ('s0',), decay='step', normalized=True)
  arguments['starts'] = oracle.starts(*[length] * 4)
  changed = dict(arguments)
  for name, size in (('q', 5.0), ('k', 1e15), ('v', -1e15), ('decay', -1e9)):
    changed[name] = arguments[name].at[:, length:2 * length].set(size)
  before, after = (run(op(implementation), a, normalize=1e-6)
                   for a in (arguments, changed))
  for name in ('y', 'dq', 'dk', 'dv', 'ddecay'):
    for other in (slice(0, length), slice(2 * length, 4 * length)):
      assert oracle.same_bits(before[name][:, other], after[name][:, other])
  for name in ('sT', 'sT1', 'ds0', 'ds01'):
    assert oracle.same_bits(before[name], after[name]), name


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_the_same_bits_twice(implementation):
  arguments = example(100, EVERYTHING, decay='step', normalized=True)
  one, two = (run(op(implementation), arguments, normalize=1e-6)
              for _ in range(2))
  for name in one:
    assert oracle.same_bits(one[name], two[name]), name


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_extreme_decays(implementation):
  arguments = example(100, ('s0',), decay='step', normalized=False)
  # A small decay keeps its digits next to one that forgets everything.
  sizes = jnp.array([-100.0, -0.01, 0.0, -1e4, -1e-3, -jnp.inf, -0.1])
  arguments['decay'] = jnp.broadcast_to(
      sizes[jnp.arange(100) % 7][None, :, None], (BATCH, 100, GROUPS))
  got = run(op(implementation), arguments)
  assert all(bool(jnp.isfinite(value).all()) for value in got.values())
  assert_agree(got, run(reference.chunked_linear_attention, arguments))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_no_array_of_all_states_or_all_pairs(implementation):
  time, heads, width = 1024, 2, 32
  series = jnp.zeros((1, time, heads, width))
  arguments = dict(q=series, k=series, v=series, decay=series[..., 0])
  compiled = run.lower(op(implementation), arguments).compile()
  limit = time * heads * min(width * width, time) // 4
  assert oracle.largest_buffer(compiled) <= limit
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * limit


@pytest.mark.parametrize('change, message', [
    (dict(k=jnp.zeros((2, 10, 3, 8)), v=jnp.zeros((2, 10, 3, 6))),
     'q has 4 heads, no multiple of the 3 of k'),
    (dict(decay=jnp.zeros(4)), r'decay has shape \[4\].*K=2'),
    (dict(s0=jnp.zeros((2, 2, 8, 6)), normalize=1e-6), 'give the pair'),
    (dict(normalize=0.0), 'must be positive'),
    (dict(s0=jnp.zeros((2, 2, 6, 8))), r's0 has shape .*H=8, V=6'),
    (dict(implementation='cuda'), 'unknown implementation'),
], ids=['heads', 'decay', 'pair', 'eps', 's0', 'implementation'])
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match=message):
    chunked.chunked_linear_attention(**{**example(10), **change})
