"""What loops over whole arrays do: cut one index out, and write one."""

import jax


def at(arrays, i, *, axis=0):
  """The arrays of a tree at index i of an axis, which is gone then."""
  return jax.tree.map(
      lambda array: jax.lax.dynamic_index_in_dim(
          array, i, axis, keepdims=False), arrays)


def put(arrays, i, values, *, axis=0):
  """The arrays of a tree with those of another at index i of an axis."""
  return jax.tree.map(
      lambda array, value: jax.lax.dynamic_update_index_in_dim(
          array, value, i, axis), arrays, values)
