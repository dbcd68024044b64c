"""What the TPU kernels of several ops do with the sizes and tiles of arrays."""

import jax
import jax.numpy as jnp

# Contractions of `dot`, by the dimensions they sum over: a b, a b^T, a^T b.
NN, NT, TN = (1, 0), (1, 1), (0, 0)


def dot(a, b, contract):
  """Matmul over one dimension of each, exact products, float32 sums."""
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (((contract[0],), (contract[1],)), ((), ())), precision=exact,
      preferred_element_type=jnp.float32)


def round_up(x, multiple):
  return -(-x // multiple) * multiple


def pad(x, axis, size):
  """Pads the end of an axis with zeros."""
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, pads) if pads[axis][1] else x


def padded_width(width):
  """H or V in a kernel: whole sublanes of bfloat16 when turned over."""
  return round_up(width, 16)
