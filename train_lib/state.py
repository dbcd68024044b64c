"""A model as a flat dict of arrays, and everything static beside it.

The trainer, the optimiser and the checkpoints work on {name: array}; only the
loss function sees the module, put together again while it is traced.
"""

import dataclasses
import functools

import jax
from flax import nnx

from model.transformer import Transformer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['step', 'params', 'opt_state', 'skipped'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a step changes.

  Attributes:
    step: int32, optimiser steps taken.
    params: {name: array}.
    opt_state: of optax.
    skipped: int32, updates left out because they were not finite.
  """
  step: jax.Array
  params: dict
  opt_state: object
  skipped: jax.Array


class AbstractModel:
  """The structure of a config's model: no arrays, nothing allocated.

  Attributes:
    module: the Transformer, of jax.ShapeDtypeStruct.
    shapes: {name: jax.ShapeDtypeStruct} of its parameters.
    variables: {name: nnx.Param}, for what a parameter says of itself.
  """

  def __init__(self, config):
    self.config = config
    self.module = jax.eval_shape(
        lambda key: _build(config, key), jax.random.key(0))
    leaves, self._treedef = jax.tree_util.tree_flatten_with_path(self.module)
    names = [_name(path) for path, _ in leaves]
    variables = jax.tree.leaves(
        self.module, is_leaf=lambda x: isinstance(x, nnx.Variable))
    self.variables = dict(zip(names, variables))
    self.shapes = {name: leaf for name, (_, leaf) in zip(names, leaves)}

  def init(self, key):
    """{name: array}, freshly initialised."""
    return dict(zip(self.shapes, jax.tree.leaves(_build(self.config, key))))

  def merge(self, params):
    """The module with these parameters."""
    return jax.tree.unflatten(
        self._treedef, [params[name] for name in self.shapes])

  def n_params(self):
    return sum(x.size for x in self.shapes.values())

  def flops_per_token(self):
    """Of a training step: the forward pass, and twice as much backward."""
    return 3 * self.module.flops(self.config.block_size)

  def state_bytes(self):
    """That decoding block_size tokens of a sequence keeps."""
    constant, per_token = self.module.state_bytes()
    return constant + self.config.block_size * per_token


def _name(path):
  return jax.tree_util.keystr(
      path, simple=True, separator='/').removesuffix('/value')


def _build(config, key):
  return Transformer(config, rngs=nnx.Rngs(key))
