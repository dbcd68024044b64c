"""Every variant against its oracle: at awkward lengths, and its gradients.

The oracle's derivative along a direction is a difference of two of its values,
in float64; ours is the gradient's product with the direction.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.layers import segment_positions
from model.sharding import Context
from tests.attention import cases, oracles
from tests.attention.cases import build, close, inputs

LENGTHS = (1, False), (63, True), (64, False), (65, True), (257, True)
STEP = 1e-6

every_case = pytest.mark.parametrize('case', [
    *cases.MAIN, *(c for c in cases.SINGLE if c.flag == 'attn_xsa')], ids=str)


def documents(T, packed):
  """int32 [2,T], of other lengths in each row, or None: one document."""
  if not packed:
    return None
  marks = np.random.default_rng(0).random((2, T)) < 6 / (T + 6)
  return jnp.asarray(np.cumsum(marks, 1), jnp.int32)


def skip_what_is_zero(case, T):
  if case.flag == 'attn_xsa' and T == 1:
    pytest.skip('a first token returns nothing')


def positions(x, ids):
  return cases.counted(x) if ids is None else segment_positions(ids)


@jax.jit
def outputs(mixer, x, ids):
  return mixer(x, Context(positions(x, ids), ids))[0]


@jax.jit
def gradients(mixer, x, ids, part):
  return jax.grad(
      lambda mixer, x: (part * outputs(mixer, x, ids)).sum(), (0, 1))(mixer, x)


def defined(case, mixer, x, ids):
  """float64 [2,T,D] by the oracle."""
  places = np.asarray(positions(x, ids))
  ids = np.zeros_like(places) if ids is None else np.asarray(ids)
  return oracles.find(case.variant)(
      mixer, np.asarray(x, np.float64), segment_ids=ids, positions=places)


@pytest.mark.slow
@pytest.mark.parametrize('T, packed', LENGTHS)
@every_case
def test_outputs_at_every_length(case, T, packed):
  skip_what_is_zero(case, T)
  mixer, x, ids = build(case), inputs(T), documents(T, packed)
  close(outputs(mixer, x, ids), defined(case, mixer, x, ids), 1e-5)


@pytest.mark.parametrize('T, packed', [
    (12, True), pytest.param(1, False, marks=pytest.mark.slow),
    pytest.param(65, True, marks=pytest.mark.slow)])
@every_case
def test_gradients(case, T, packed):
  skip_what_is_zero(case, T)
  mixer, x, ids = build(case), inputs(T), documents(T, packed)
  rng = np.random.default_rng(1)
  part = rng.standard_normal(x.shape)
  grads = gradients(mixer, x, ids, jnp.asarray(part, jnp.float32))
  (mixer, x), grads = jax.tree.map(
      lambda a: np.asarray(a, np.float64), ((mixer, x), grads))
  leaves, structure = jax.tree.flatten((mixer, x))
  grads = jax.tree.leaves(grads)
  # What rounding leaves where gradients cancel.
  noise = 1e-6 * max(np.abs(grad).max() for grad in grads)
  for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
    # Nearly along the gradient: no sum of its numbers cancels.
    way = grad * (1 + 0.5 * rng.standard_normal(grad.shape))
    way *= STEP / max(np.abs(way).max(), 1e-30)

    def value(sign, i=i, moved=way, leaf=leaf):
      changed = [*leaves[:i], leaf + sign * moved, *leaves[i + 1:]]
      return (part * defined(
          case, *jax.tree.unflatten(structure, changed), ids)).sum()

    want, got = (value(1) - value(-1)) / 2, (grad * way).sum()
    error = abs(got - want) - noise * np.abs(way).sum()
    # A number of which each head has one is a sum over tokens that cancels,
    # and of a saturated tanh the slope is a difference of nearly equal numbers.
    tolerance = 3e-5 if leaf.size > cases.MODEL['n_head'] else 1e-4
    if 'attn_logit_softcapping' in dict(case.flags):
      tolerance = 3e-4
    assert error <= tolerance * abs(want), (i, leaf.shape, got, want)
