"""A model as names and shapes, and back."""

import jax
import pytest

from train_lib.state import AbstractModel


@pytest.fixture
def model(config):
  config.vocab_size = 32
  return AbstractModel(config)


def test_nothing_is_allocated(model):
  leaves = jax.tree.leaves(model.module)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  assert model.n_params() == sum(x.size for x in leaves)


def test_init_then_merge_is_the_model(model):
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
      name: (x.shape, x.dtype) for name, x in model.shapes.items()}
  merged = model.merge(params)
  assert jax.tree.structure(merged) == jax.tree.structure(model.module)
  assert jax.tree.leaves(merged.embed.tokens) == [params['embed/tokens']]


def test_names_are_paths(model):
  assert 'embed/tokens' in model.shapes
  assert model.variables['embed/tokens'].letters
  assert set(model.variables) == set(model.shapes)
