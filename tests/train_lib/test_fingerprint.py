"""A fingerprint changes with any element, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from train_lib import fingerprint


def test_fingerprint_sees_any_element():
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  mark = lambda x: fingerprint.marks({'x': x})['x']
  swapped = x.copy()
  swapped[0, 1], swapped[2, 2] = x[2, 2], x[0, 1]
  nearly = x.copy()
  nearly[1, 1] = np.nextafter(nearly[1, 1], 9)
  assert len({mark(x), mark(swapped), mark(nearly), mark(-x)}) == 4
  assert mark(x) == mark(x.copy())


def test_shapes_are_those_of_the_template_too():
  x = jnp.zeros((2, 3), jnp.int32)
  same = jax.ShapeDtypeStruct(x.shape, x.dtype)
  assert fingerprint.shapes({'x': x}) == {'x': 'int32[2, 3]'}
  assert fingerprint.shapes({'x': same}) == fingerprint.shapes({'x': x})
