"""The causal convolution before a selective scan, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels.conv import causal_conv1d
from tests.kernels.measure import assert_agree, same_bits
from tests.kernels.row import random_starts


def dot(tree):
  """A scalar that weighs every number of a tree differently."""
  rng = np.random.default_rng(1)
  return sum((leaf * rng.standard_normal(leaf.shape)).sum()
             for leaf in jax.tree.leaves(tree))


def example(time, width=4, batch=2, channels=12):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return dict(
      x=normal(batch, time, channels), w=normal(width, channels),
      bias=normal(channels), state=normal(batch, width - 1, channels),
      starts=random_starts(rng, batch, time, every=3))


conv = jax.jit(causal_conv1d)


def loop(x, w, bias, state, starts):
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
def test_matches_its_definition(time):
  arguments = example(time)
  y, _ = conv(**arguments)
  assert_agree(dict(y=y), dict(y=loop(**arguments)))


def sum_of_all_pairs(x, w, bias, state, starts):
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
def test_gradients_are_those_of_its_definition(time, width):
  arguments = example(time, width)
  ids = dict(starts=arguments.pop('starts'))
  loss = lambda f: jax.jit(jax.grad(lambda arrays: dot(f(**arrays, **ids))))
  got = loss(lambda **a: causal_conv1d(**a)[0])(arguments)
  assert_agree(got, loss(sum_of_all_pairs)(arguments))


def test_handed_on_has_the_bits_of_the_whole():
  arguments = example(20)
  whole, end = conv(**arguments)
  parts, state = [], arguments['state']
  for start, stop in ((0, 7), (7, 8), (8, 10), (10, 20)):
    y, state = conv(
        arguments['x'][:, start:stop], arguments['w'], arguments['bias'],
        state=state, starts=arguments['starts'][:, start:stop])
    parts.append(y)
  assert same_bits(jnp.concatenate(parts, axis=1), whole)
  assert same_bits(state, end)


def test_documents_are_isolated_bit_for_bit():
  arguments = example(20)
  arguments['starts'] = jnp.zeros((2, 20), bool).at[:, jnp.array([8, 13])].set(
      True)
  changed = {**arguments, 'x': arguments['x'].at[:, 8:13].set(np.nan)}

  @jax.jit
  def run(arguments):
    loss = lambda x: dot(causal_conv1d(**{**arguments, 'x': x})[0])
    return causal_conv1d(**arguments)[0], jax.grad(loss)(arguments['x'])

  for before, after in zip(run(arguments), run(changed)):
    assert same_bits(before[:, :8], after[:, :8])
    assert same_bits(before[:, 13:], after[:, 13:])
