"""What the kernels' tests share."""

import math
import re

import numpy as np


def relative_rms(got, want):
  """Root mean square of the error over that of the wanted values."""
  got, want = (np.asarray(a).astype(np.float64) for a in (got, want))
  assert got.shape == want.shape, (got.shape, want.shape)
  error, size = (np.sqrt((a**2).sum()) for a in (got - want, want))
  return error / size if size else error


def same_bits(one, other):
  return np.asarray(one).tobytes() == np.asarray(other).tobytes()


def largest_buffer(compiled):
  """Most elements that any array of a compiled program has."""
  shapes = re.findall(r'\b(?:f32|bf16)\[([\d,]+)\]', compiled.as_text())
  return max(math.prod(map(int, shape.split(','))) for shape in shapes)


def starts(*lengths, rows=2):
  """bool [rows,T]: documents of these lengths; the first one goes on in row 0.

  In the other rows it starts, so that the state before it does not count.
  """
  first = np.cumsum([0, *lengths[:-1]])
  marks = np.zeros((rows, sum(lengths)), bool)
  marks[:, first] = True
  marks[0, 0] = False
  return marks


def random_starts(rng, rows, time, *, every):
  """bool [rows,T]: starts at some multiples of `every`; see `starts`."""
  marks = np.zeros((rows, time), bool)
  marks[:, ::every] = rng.random((rows, -(-time // every))) < 0.7
  marks[:, 0] = np.arange(rows) > 0
  return marks
