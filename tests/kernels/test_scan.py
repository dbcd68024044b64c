"""Selective scan, and the convolution before it, against their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels import scan
from attention.kernels.conv import causal_conv1d
from attention.kernels.scan import reference
from tests.kernels import oracle

IMPLEMENTATIONS = ('xla',)
TOLERANCE = 2e-6
BATCH, CHANNELS, STATE = 2, 12, 4
IDS = {'starts'}


def example(time, options=(), *, seed=0, dtype=jnp.float32):
  """Arguments by name, with the named optional ones."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  series = (BATCH, time, CHANNELS)
  every = dict(
      x=normal(*series), dt=normal(*series) - 2,
      A=-np.exp(normal(CHANNELS, STATE)), B=normal(BATCH, time, STATE),
      C=normal(BATCH, time, STATE), D=normal(CHANNELS), z=normal(*series),
      dt_bias=normal(CHANNELS), h0=normal(BATCH, CHANNELS, STATE),
      starts=oracle.random_starts(rng, BATCH, time, every=9))
  low = {'x', 'dt', 'B', 'C', 'z'}
  return {name: jnp.asarray(value, dtype if name in low else None)
          for name, value in every.items()
          if name in options or name in ('x', 'dt', 'A', 'B', 'C', 'D')}


def dot(tree, seed=1):
  """A scalar that weighs every number of a tree differently."""
  rng = np.random.default_rng(seed)
  return sum((leaf * rng.standard_normal(leaf.shape)).sum()
             for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=(0,), static_argnames='dt_softplus')
def run(op, arguments, dt_softplus=True):
  """Outputs, final state and the gradient of every array."""
  ids = {name: arguments[name] for name in IDS & set(arguments)}
  arrays = {name: arguments[name] for name in set(arguments) - IDS}

  def weighed(arrays):
    outputs = op(**arrays, **ids, dt_softplus=dt_softplus)
    return dot(outputs), outputs

  (_, (y, hT)), gradients = jax.value_and_grad(
      weighed, has_aux=True)(arrays)
  return dict(y=y, hT=hT, **{f'd{name}': gradients[name] for name in arrays})


@functools.cache
def op(implementation):
  return jax.jit(
      functools.partial(scan.selective_scan, implementation=implementation),
      static_argnames='dt_softplus')


def assert_agree(got, want, tolerance=TOLERANCE):
  errors = {name: oracle.relative_rms(got[name], want[name]) for name in want}
  wrong = {name: e for name, e in errors.items() if not e <= tolerance}
  assert not wrong, wrong


@pytest.mark.parametrize('time, options', [
    pytest.param(1, ('z', 'dt_bias', 'h0', 'starts'),
                 id='T1-all'),
    pytest.param(63, (), id='T63-bare'),
    pytest.param(63, ('starts', 'h0'), id='T63-segments'),
    pytest.param(100, ('z', 'dt_bias', 'h0', 'starts'),
                 id='T100-all'),
    pytest.param(257, ('dt_bias', 'h0'), id='T257-h0'),
])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_matches_reference(implementation, time, options):
  arguments = example(time, options)
  assert_agree(run(op(implementation), arguments),
               run(reference.selective_scan, arguments))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_steps_without_softplus(implementation):
  arguments = example(63, ('z', 'h0'))
  arguments['dt'] = jnp.abs(arguments['dt'])
  assert_agree(run(op(implementation), arguments, dt_softplus=False),
               run(reference.selective_scan, arguments, dt_softplus=False))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_low_precision_inputs_keep_a_float32_state(implementation):
  arguments = example(63, ('z', 'h0'), dtype=jnp.bfloat16)
  got = run(op(implementation), arguments)
  assert got['y'].dtype == jnp.bfloat16
  assert got['hT'].dtype == jnp.float32
  want = run(reference.selective_scan, arguments)
  assert_agree({'hT': got['hT']}, {'hT': want['hT']})
  assert_agree(got, want, tolerance=5e-3)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_start_at_the_first_step_decides_whether_h0_counts(implementation):
  arguments = example(63, ('h0', 'starts'))
  dh0 = run(op(implementation), arguments)['dh0']
  assert np.any(dh0[0]), 'row 0 continues the document of h0'
  assert not np.any(dh0[1]), 'row 1 starts another document'


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_handing_the_state_on_equals_the_whole(implementation):
  arguments = example(100, ('z', 'dt_bias', 'starts'))
  whole, hT = op(implementation)(**arguments)
  parts, h = [], None
  for start, stop in ((0, 63), (63, 64), (64, 100)):
    part = {name: value[:, start:stop] if name in (
        'x', 'dt', 'B', 'C', 'z', 'starts') else value
            for name, value in arguments.items()}
    y, h = op(implementation)(**part, h0=h)
    parts.append(y)
  assert_agree(dict(y=jnp.concatenate(parts, axis=1), hT=h),
               dict(y=whole, hT=hT))


@pytest.mark.parametrize('garbage', [3.0, np.inf, np.nan])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_documents_are_isolated_bit_for_bit(implementation, garbage):
  arguments = example(100, ('z', 'dt_bias', 'h0', 'starts'))
  arguments['starts'] = oracle.starts(25, 25, 25, 25)
  changed = dict(arguments)
  for name in ('x', 'dt', 'B', 'C', 'z'):
    changed[name] = arguments[name].at[:, 25:50].set(garbage)
  before, after = (run(op(implementation), a) for a in (arguments, changed))
  for name in ('y', 'dx', 'ddt', 'dB', 'dC', 'dz'):
    for other in (slice(0, 25), slice(50, 100)):
      assert oracle.same_bits(before[name][:, other], after[name][:, other])
  for name in ('hT', 'dh0'):
    assert oracle.same_bits(before[name], after[name])


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_the_same_bits_twice(implementation):
  arguments = example(100, ('z', 'dt_bias', 'h0', 'starts'))
  one, two = (run(op(implementation), arguments) for _ in range(2))
  for name in one:
    assert oracle.same_bits(one[name], two[name]), name


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_extreme_steps(implementation):
  arguments = example(63, ('h0',))
  # Steps of nothing, of 1e-30, and of A * step = -50 and far beyond.
  steps = jnp.array([0.0, 1e-30, 1.0, 50.0, 1e4])
  arguments['dt'] = steps[jnp.arange(63) % 5][None, :, None] + jnp.zeros(
      (BATCH, 63, CHANNELS))
  got = run(op(implementation), arguments, dt_softplus=False)
  assert all(bool(jnp.isfinite(value).all()) for value in got.values())
  assert_agree(got, run(
      reference.selective_scan, arguments, dt_softplus=False))
  arguments['dt'] = jnp.full_like(arguments['dt'], -200.0)
  got = run(op(implementation), arguments)
  assert all(bool(jnp.isfinite(value).all()) for value in got.values())


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_no_array_of_all_states(implementation):
  arguments = {
      name: jnp.zeros(shape) for name, shape in dict(
          x=(2, 256, 64), dt=(2, 256, 64), A=(64, 16), B=(2, 256, 16),
          C=(2, 256, 16), D=(64,), z=(2, 256, 64)).items()}
  compiled = run.lower(op(implementation), arguments).compile()
  states = 2 * 256 * 64 * 16
  assert oracle.largest_buffer(compiled) <= states // 4
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * states


def test_vmap_and_remat():
  arguments = example(10, ('h0',))
  loss = lambda x: dot(scan.selective_scan(**{**arguments, 'x': x}))
  x = jnp.stack([arguments['x'], 2 * arguments['x']])
  got = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(x)
  want = jnp.stack([jax.jit(jax.grad(loss))(x) for x in x])
  assert oracle.relative_rms(got, want) <= TOLERANCE


@pytest.mark.parametrize('change, message', [
    (dict(dt=jnp.zeros((2, 9, 12))), r'dt has shape \[2, 9, 12\].*T=10'),
    (dict(h0=jnp.zeros((2, 4, 12))), r'h0 has shape .*E=12, M=4'),
    (dict(starts=jnp.zeros((2, 9), bool)), r'starts has shape .*T=10'),
    (dict(implementation='cuda'), 'unknown implementation'),
], ids=['dt', 'h0', 'starts', 'implementation'])
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match=message):
    scan.selective_scan(**{**example(10), **change})


def conv_example(time, width=4):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return dict(
      x=normal(BATCH, time, CHANNELS), w=normal(width, CHANNELS),
      bias=normal(CHANNELS), state=normal(BATCH, width - 1, CHANNELS),
      starts=oracle.random_starts(rng, BATCH, time, every=3))


conv = jax.jit(causal_conv1d)


def conv_loop(x, w, bias, state, starts):
  """The definition, one output at a time."""
  y = np.zeros(x.shape)
  for row in range(x.shape[0]):
    known = list(np.asarray(state[row]))
    for t, start in enumerate(np.asarray(starts[row])):
      if start:
        known = [np.zeros_like(x[row, t])] * len(known)
      known = [*known, np.asarray(x[row, t])]
      y[row, t] = bias + sum(w[i] * known[i] for i in range(len(w)))
      known = known[1:]
  return y


@pytest.mark.parametrize('time', [1, 2, 20])
def test_conv_matches_its_definition(time):
  arguments = conv_example(time)
  y, _ = conv(**arguments)
  assert oracle.relative_rms(y, conv_loop(**arguments)) <= TOLERANCE


def conv_of_all_pairs(x, w, bias, state, starts):
  """The definition as a sum over all pairs of tokens, for its gradient."""
  past, padded = len(w) - 1, jnp.concatenate([state, x], axis=1)
  document = jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (past, 0)))
  t, s = jnp.arange(x.shape[1])[:, None], jnp.arange(padded.shape[1])
  near = (s >= t) & (s <= t + past)
  same = document[:, past:, None] == document[:, None]
  taps = jnp.where(near & same, 1.0, 0.0)[..., None] * w[
      jnp.clip(s - t, 0, past)]
  return bias + jnp.einsum('BTSE,BSE->BTE', taps, padded, precision='highest')


@pytest.mark.parametrize('time, width', [(1, 4), (2, 4), (20, 4), (20, 1)])
def test_conv_gradients_are_those_of_its_definition(time, width):
  arguments = conv_example(time, width)
  ids = {name: arguments.pop(name) for name in IDS}
  loss = lambda f: jax.jit(jax.grad(lambda arrays: dot(f(**arrays, **ids))))
  got = loss(lambda **a: causal_conv1d(**a)[0])(arguments)
  assert_agree(got, loss(conv_of_all_pairs)(arguments))


def test_conv_handed_on_has_the_bits_of_the_whole():
  arguments = conv_example(20)
  whole, end = conv(**arguments)
  parts, state = [], arguments['state']
  for start, stop in ((0, 7), (7, 8), (8, 10), (10, 20)):
    y, state = conv(
        arguments['x'][:, start:stop], arguments['w'], arguments['bias'],
        state=state, starts=arguments['starts'][:, start:stop])
    parts.append(y)
  assert oracle.same_bits(jnp.concatenate(parts, axis=1), whole)
  assert oracle.same_bits(state, end)


def test_conv_documents_are_isolated_bit_for_bit():
  arguments = conv_example(20)
  arguments['starts'] = oracle.starts(8, 5, 7)
  changed = {**arguments, 'x': arguments['x'].at[:, 8:13].set(np.nan)}

  @jax.jit
  def run_conv(arguments):
    loss = lambda x: dot(causal_conv1d(**{**arguments, 'x': x})[0])
    return causal_conv1d(**arguments)[0], jax.grad(loss)(arguments['x'])

  for before, after in zip(run_conv(arguments), run_conv(changed)):
    assert oracle.same_bits(before[:, :8], after[:, :8])
    assert oracle.same_bits(before[:, 13:], after[:, 13:])
