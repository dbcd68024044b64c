"""A model as names and shapes, and back."""

import jax
import numpy as np
import pytest
from flax import nnx

from model.transformer import Transformer
from train_lib.state import AbstractModel


@pytest.fixture
def model(config):
  config.vocab_size = 32
  return AbstractModel(config)


def test_nothing_is_allocated(model):
  leaves = jax.tree.leaves(model.module)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  assert model.n_params() == sum(x.size for x in leaves)


def test_init_then_merge_is_the_model(config, model):
  params = jax.jit(model.init)(jax.random.key(3))
  assert {n: (x.shape, x.dtype) for n, x in params.items()} == {
      n: (x.shape, x.dtype) for n, x in model.shapes.items()}
  built = jax.jit(lambda key: Transformer(config, rngs=nnx.Rngs(key)))(
      jax.random.key(3))
  jax.tree.map(np.testing.assert_array_equal, model.merge(params), built)


def test_names_are_paths(model):
  assert 'embed/tokens' in model.shapes
  assert model.variables['embed/tokens'].axes is not None
  assert set(model.variables) == set(model.shapes)
