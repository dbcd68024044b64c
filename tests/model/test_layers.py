"""The leaf of the house."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import layers
from model.layers import Einsum

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('bias', [False, True], ids=['bare', 'bias'])
@pytest.mark.parametrize('equation, shape', [
    ('BTD,DF->BTF', (6, 4)), ('BTD,DNH->BTNH', (6, 2, 3)),
    ('BTNV,NVD->BTD', (2, 3, 5)), ('BTNV,NVMH->BTMH', (2, 3, 2, 2))])
def test_einsum_is_an_einsum(equation, shape, bias):
  source, target = equation.split(',')[0][2:], equation.split('->')[1][2:]
  layer = Einsum(equation, shape, std=1.0, bias=bias, rngs=nnx.Rngs(0))
  x = normal(2, 3, *shape[:len(source)])
  want = jnp.einsum(equation, x, layer.weight[...])
  if bias:
    assert layer.bias[...].shape == shape[-len(target):]
    assert layer.bias.letters == target and not layer.bias.decay
    layer.bias[...] = normal(*layer.bias.shape)
    want += layer.bias[...]
  else:
    assert layer.bias is None
  np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-5)
  assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert layer.weight.letters == source + target and layer.weight.decay
  assert layer.weight.n_inputs == len(source)
  assert layer.flops == 2 * np.prod(shape)


@pytest.mark.parametrize('equation, shape', [
    ('BTD,FD->BTF', (4, 6)), ('BTD,DF->BTD', (6, 6)), ('TD,DF->TF', (6, 4)),
    ('BTD,DF->BTF', (6, 4, 2))])
def test_einsum_refuses_other_forms(equation, shape):
  with pytest.raises(ValueError, match='not of the form'):
    Einsum(equation, shape, std=1.0, rngs=nnx.Rngs(0))


def test_einsum_has_the_standard_deviation_it_is_given():
  layer = Einsum('BTD,DF->BTF', (64, 64), std=0.3, rngs=nnx.Rngs(0))
  assert float(layer.weight[...].std()) == pytest.approx(0.3, rel=0.05)
  assert layer.weight[...].dtype == jnp.float32


def test_rotary_is_relative():
  """q at i times k at j depends on i - j alone, and not at i = j."""
  q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8)

  @jax.jit
  def score(i, j):
    turn = lambda x, t: layers.rotary(x, jnp.full((1, 1), t), base=100.0)
    return (turn(q, i) * turn(k, j)).sum()
  assert score(7, 4) == pytest.approx(float(score(1003, 1000)), abs=1e-4)
  assert score(5, 5) == pytest.approx(float((q * k).sum()), abs=1e-5)
  assert abs(score(7, 4) - score(4, 7)) > 1e-2
  assert abs(score(7, 4) - score(7, 5)) > 1e-2


def test_rotary_keeps_lengths_and_the_first_position():
  x = normal(2, 5, 3, 8)
  y = layers.rotary(x, jnp.arange(5)[None], base=1e4)
  np.testing.assert_allclose(y[:, 0], x[:, 0], atol=1e-6)
  np.testing.assert_allclose(
      jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
  # The first pair turns by one radian a position.
  angle = jnp.arctan2(y[..., 4], y[..., 0]) - jnp.arctan2(x[..., 4], x[..., 0])
  want = jnp.broadcast_to(jnp.arange(5.0)[None, :, None], angle.shape)
  np.testing.assert_allclose(
      jnp.cos(angle - want), jnp.ones_like(angle), atol=1e-5)


def test_rotary_needs_an_even_width():
  with pytest.raises(ValueError, match='even head width, not 3'):
    layers.rotary(normal(1, 2, 1, 3), jnp.arange(2)[None], base=1e4)


@pytest.mark.parametrize('width, fraction, turned', [
    (8, 0.25, 2), (8, 0.1, 2), (20, 0.3, 6), (20, 0.39, 6), (7, 0.99, 6),
    (100, 0.29, 28)])
def test_a_fraction_rotates_the_first_numbers_as_if_they_were_all(
    width, fraction, turned):
  x, positions = normal(1, 5, 2, width), jnp.arange(5)[None]
  y = layers.rotary(x, positions, base=50.0, fraction=fraction)
  np.testing.assert_array_equal(
      y[..., :turned], layers.rotary(x[..., :turned], positions, base=50.0))
  np.testing.assert_array_equal(y[..., turned:], x[..., turned:])


@pytest.mark.parametrize('make, want', [
    (layers.RMSNorm, lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True))),
    (layers.LayerNorm, lambda x: (x - x.mean(-1, keepdims=True)) / x.std(
        -1, keepdims=True))], ids=['rmsnorm', 'layernorm'])
def test_norms(make, want):
  x, layer = 1000 * normal(2, 3, 8) + 5, make(8, bias=True)
  layer.weight[...] = normal(8)
  want = want(np.asarray(x, np.float64)) * layer.weight[...]
  np.testing.assert_allclose(layer(x), want, atol=1e-4)
  assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert jnp.isfinite(layer(jnp.zeros((1, 1, 8)))).all()
  assert (getattr(make(8), 'bias', None) is None)
  assert not layer.weight.decay


def test_norms_are_computed_in_float32():
  x = jnp.full((1, 1, 64), 300.0, jnp.bfloat16)  # The square sum is inexact.
  np.testing.assert_array_equal(
      layers.rms_normalize(x).astype(jnp.float32), 1.0)


def test_segment_positions_start_anew_in_every_document():
  ids = jnp.array(
      [[3, 3, 3, 1, 1, 3], [0, 1, 1, 1, 2, 2], [-1, -1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(
      layers.segment_positions(ids),
      [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3]])


@pytest.mark.parametrize('letters, decay', [
    ('_', False), ('DF', True), ('', False)])
def test_weight_decay_is_for_matrices(letters, decay):
  value = jnp.ones((2,) * len(letters), jnp.bfloat16)
  made = layers.param(value, letters)
  assert made.decay is decay and made[...].dtype == jnp.float32
  assert not layers.param(value, letters, decay=False).decay
