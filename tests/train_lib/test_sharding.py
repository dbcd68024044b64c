"""Where parameters, moments and batches lie on eight devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from train_lib import run as run_lib
from train_lib import sharding


@pytest.fixture
def run(config, tmp_path):
  config.update(mesh_data=2, mesh_fsdp=2, mesh_tensor=2)
  return run_lib.open_run(config, tmp_path / 'run')


def test_moments_lie_where_their_parameters_lie(run):
  state = run.init_state()
  query = 'periods/0/mixer/query/weight'
  want = P(None, 'fsdp', 'tensor', None)
  assert state.params[query].sharding.spec == want
  moments = [x for x in jax.tree.leaves(state.opt_state)
             if x.shape == state.params[query].shape]
  assert len(moments) >= 2
  shared = {n: x.sharding.spec for n, x in state.params.items()}
  adam = state.opt_state[1]
  assert {n: x.sharding.spec for n, x in adam.mu.items()} == shared
  assert {n: x.sharding.spec for n, x in adam.nu.items()} == shared
  local = state.params[query].addressable_shards[0].data.shape
  assert local == (2, 8, 1, 8)


def test_what_the_mesh_does_not_divide_is_told(config, tmp_path):
  config.update(mesh_data=2, mesh_fsdp=2, mesh_tensor=2, vocab_size=257)
  run = run_lib.open_run(config, tmp_path / 'run')
  assert sharding.replicated(run.model, run.mesh) == ['embed/tokens']


def test_batches_are_the_same_on_any_mesh(run):
  batch = run.batch(3)['tokens']
  assert batch.sharding.spec == P(('data', 'fsdp'))
  np.testing.assert_array_equal(batch, run.batch(3)['tokens'])
  assert not np.array_equal(batch, run.batch(4)['tokens'])
  assert batch.addressable_shards[0].data.shape == (2, 17)


@pytest.mark.parametrize('sizes,message', [
    ((3, 1, 1), 'does not fit the 8 devices'),
    ((-1, -1, 1), 'at most one is -1'),
    ((0, 1, 1), 'sizes are positive'),
    ((1, 1, 16), 'does not fit'),
    ((4, 4, 1), 'does not fit'),
])
def test_meshes_that_do_not_fit(config, sizes, message):
  config.update(dict(zip(
      ('mesh_data', 'mesh_fsdp', 'mesh_tensor'), sizes)))
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(config)


def test_the_rest_goes_to_minus_one(config):
  config.update(mesh_data=-1, mesh_fsdp=2, mesh_tensor=1)
  assert dict(sharding.make_mesh(config).shape) == {
      'data': 4, 'fsdp': 2, 'tensor': 1}
