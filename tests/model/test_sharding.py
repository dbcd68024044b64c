"""What a layer knows besides its input, and how arrays lie on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from model import sharding
from model.sharding import Context


def context(T, **kwargs):
  return Context(jnp.arange(T)[None], **kwargs)


def mesh_of(*sizes):
  return jax.make_mesh(sizes, ('data', 'fsdp', 'tensor'),
                       axis_types=(AxisType.Auto,) * 3)


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


def test_a_document_starts_where_its_position_is_0():
  positions = jnp.array([[0, 1, 0, 0, 1], [3, 4, 5, 0, 1]])
  np.testing.assert_array_equal(
      Context(positions, jnp.zeros_like(positions)).starts, positions == 0)
  assert Context(positions).starts is None


@pytest.mark.parametrize('letters, shape, want', [
    ('DF', (4, 8), P('fsdp', 'tensor')),
    ('DF', (3, 8), P(None, 'tensor')),
    ('DF', (4, 7), P('fsdp', None)),
    ('DNH', (4, 2, 3), P('fsdp', 'tensor', None)),
    ('DF', (5, 4, 8), P(None, 'fsdp', 'tensor')),
    ('BT', (4, 3), P(('data', 'fsdp'), None)),
    ('BT', (2, 3), P(None, None)),
    ('BTD', (4, 3, 8), P(('data', 'fsdp'), None, None)),
    ('_', (4,), P(None)), ('', (), P()), ('', (3,), P(None))])
def test_spec_replicates_what_does_not_divide(letters, shape, want):
  assert sharding.spec(letters, shape, mesh_of(2, 2, 2)) == want


def test_mesh_size():
  mesh = mesh_of(2, 1, 4)
  sizes = {a: sharding.mesh_size(mesh, a) for a in 'BDN_X'}
  assert sizes == {'B': 2, 'D': 1, 'N': 4, '_': 1, 'X': 1}
  assert sharding.mesh_size(None, 'N') == 1


def test_sharded_runs_every_shard_on_its_own():
  ctx = context(1, mesh=mesh_of(2, 2, 2))
  x = jnp.arange(8.0 * 4).reshape(8, 4)
  seen = []

  def local(x, missing, nested, n):
    assert missing is None and nested[1] is None
    seen.append((x.shape, nested[0].shape))
    return x * n, (x.sum(1), nested[0])
  call = ctx.sharded(local, inputs=('BN', ('B', 'N'), ('B', 'N'), ''),
                     outputs=('BN', ('B', 'B')))
  y, (_, same) = jax.jit(call)(x, None, (x[:, 0], None), jnp.float32(2))
  np.testing.assert_array_equal(y, 2 * x)
  np.testing.assert_array_equal(same, x[:, 0])
  assert set(seen) == {((2, 2), (2,))}


def test_sharded_refuses_what_the_mesh_does_not_divide():
  ctx = context(1, mesh=mesh_of(2, 2, 2))
  call = ctx.sharded(lambda x: x, inputs=('BN',), outputs='BN')
  with pytest.raises(ValueError, match=r'mesh_tensor \(2\) must divide N'):
    call(jnp.zeros((4, 3)))
  with pytest.raises(
      ValueError, match=r'mesh_data x mesh_fsdp \(4\) must divide B \(6\)'):
    call(jnp.zeros((6, 4)))


def test_sharded_is_the_function_itself_on_one_device():
  assert context(1).sharded(len, inputs=('',), outputs='') is len
