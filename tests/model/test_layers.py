"""The leaf of the house."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from model import layers
from model.layers import Context, Einsum

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def context(T, **kwargs):
  return Context(jnp.arange(T)[None], **kwargs)


def mesh_of(*sizes):
  return jax.make_mesh(sizes, ('data', 'fsdp', 'tensor'),
                       axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize('bias', [False, True], ids=['bare', 'bias'])
@pytest.mark.parametrize('equation, shape', [
    ('BTD,DF->BTF', (6, 4)), ('BTD,DNH->BTNH', (6, 2, 3)),
    ('BTNV,NVD->BTD', (2, 3, 5)), ('BTNV,NVMH->BTMH', (2, 3, 2, 2))])
def test_einsum_is_an_einsum(equation, shape, bias):
  source, target = equation.split(',')[0][2:], equation.split('->')[1][2:]
  axes = tuple(f'axis {i}' for i in range(len(shape)))
  layer = Einsum(equation, shape, axes=axes, std=1.0, bias=bias,
                 rngs=nnx.Rngs(0))
  x = normal(2, 3, *shape[:len(source)])
  want = jnp.einsum(equation, x, layer.weight[...])
  if bias:
    assert layer.bias[...].shape == shape[-len(target):]
    assert layer.bias.axes == axes[-len(target):] and not layer.bias.decay
    layer.bias[...] = normal(*layer.bias.shape)
    want += layer.bias[...]
  else:
    assert layer.bias is None
  np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-5)
  assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert layer.weight.axes == axes and layer.weight.decay
  assert layer.weight.n_inputs == len(source)
  assert layer.flops == 2 * np.prod(shape)


@pytest.mark.parametrize('equation, shape', [
    ('BTD,FD->BTF', (4, 6)), ('BTD,DF->BTD', (6, 6)), ('TD,DF->TF', (6, 4)),
    ('BTD,DF->BTF', (6, 4, 2))])
def test_einsum_refuses_other_forms(equation, shape):
  with pytest.raises(ValueError, match='not of the form'):
    Einsum(equation, shape, axes=(None,) * 3, std=1.0, rngs=nnx.Rngs(0))


def test_einsum_has_the_standard_deviation_it_is_given():
  layer = Einsum('BTD,DF->BTF', (64, 64), axes=(None, None), std=0.3,
                 rngs=nnx.Rngs(0))
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


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate):
  ctx, x = context(1, dropout_key=jax.random.key(0)), jnp.ones((200, 200))
  y = np.asarray(ctx.dropout(x, rate, salt=0))
  assert (y == 0).mean() == pytest.approx(rate, abs=0.01)
  assert y.mean() == pytest.approx(1.0, abs=0.02)
  np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
  assert ctx.dropout(x.astype(jnp.bfloat16), rate, salt=0).dtype == jnp.bfloat16


def test_dropout_is_told_apart_by_key_and_salt_alone():
  x = jnp.ones((50, 50))
  drop = lambda seed, salt: np.asarray(
      context(1, dropout_key=jax.random.key(seed)).dropout(x, 0.5, salt=salt))
  assert (drop(0, 0) == drop(0, 0)).all()
  assert (drop(0, 0) != drop(0, 1)).any()
  assert (drop(0, 0) != drop(1, 0)).any()


def test_no_dropout_without_a_key_or_a_rate():
  x = jnp.ones((5, 5))
  assert context(1).dropout(x, 0.5, salt=0) is x
  assert context(1, dropout_key=jax.random.key(0)).dropout(x, 0, salt=0) is x


@pytest.mark.parametrize('axes, shape, want', [
    (('embed', 'mlp'), (4, 8), P('fsdp', 'tensor')),
    (('embed', 'mlp'), (3, 8), P(None, 'tensor')),
    (('embed', 'mlp'), (4, 7), P('fsdp', None)),
    (('embed', 'heads', None), (4, 2, 3), P('fsdp', 'tensor', None)),
    (('embed', 'mlp'), (5, 4, 8), P(None, 'fsdp', 'tensor')),
    (('batch', None), (4, 3), P(('data', 'fsdp'), None)),
    (('batch', None), (2, 3), P(None, None)),
    ((None,), (4,), P(None)), ((), (), P()), ((), (3,), P(None))])
def test_spec_replicates_what_does_not_divide(axes, shape, want):
  assert layers.spec(axes, shape, mesh_of(2, 2, 2)) == want


def test_mesh_size():
  mesh = mesh_of(2, 1, 4)
  sizes = {a: layers.mesh_size(mesh, a)
           for a in ('batch', 'embed', 'heads', None, 'unlisted')}
  assert sizes == {
      'batch': 2, 'embed': 1, 'heads': 4, None: 1, 'unlisted': 1}
  assert layers.mesh_size(None, 'heads') == 1


def test_sharded_runs_every_shard_on_its_own():
  ctx = context(1, mesh=mesh_of(2, 2, 2))
  x = jnp.arange(8.0 * 4).reshape(8, 4)
  seen = []

  def local(x, missing, n):
    assert missing is None
    seen.append(x.shape)
    return x * n, x.sum(1)
  call = ctx.sharded(local, inputs=(('batch', 'heads'), ('batch',), ()),
                     outputs=(('batch', 'heads'), ('batch',)))
  y, _ = jax.jit(call)(x, None, jnp.float32(2))
  np.testing.assert_array_equal(y, 2 * x)
  assert set(seen) == {(2, 2)}


def test_sharded_is_the_function_itself_on_one_device():
  assert context(1).sharded(len, inputs=((),), outputs=()) is len


def test_pick_names_the_flag_the_value_and_the_nearest():
  with pytest.raises(ValueError) as error:
    layers.pick('norm_variant', 'layer_norm', layers.NORMS)
  assert str(error.value) == (
      "unknown norm_variant 'layer_norm', did you mean 'layernorm'? known: "
      'rmsnorm, layernorm')


@pytest.mark.parametrize('axes, decay', [
    ((None,), False), (('embed', 'mlp'), True), ((), False)])
def test_weight_decay_is_for_matrices(axes, decay):
  value = jnp.ones((2,) * len(axes), jnp.bfloat16)
  made = layers.param(value, *axes)
  assert made.decay is decay and made[...].dtype == jnp.float32
  assert not layers.param(value, *axes, decay=False).decay
