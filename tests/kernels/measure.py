"""How results are compared: their errors, their bits, the size of a program."""

import math
import re

import jax.numpy as jnp
import numpy as np

TOLERANCE = 2e-6


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


def assert_agree(got, want, tolerance=TOLERANCE):
  """Checks results by name; what is infinite must be so in both."""
  _assert_within(got, want, dict.fromkeys(want, tolerance))


def assert_rounded(got, exact, rounded):
  """At most twice the error of rounding the definition's inputs and outputs.

  Args:
    got: results of low-precision inputs, by name.
    exact: the definition's, of the inputs before they were rounded.
    rounded: the definition's, of the inputs that got has had.
  """
  low = next(x.dtype for x in got.values() if x.dtype.itemsize == 2)
  limits = {}
  for name, want in exact.items():
    assert got[name].dtype == rounded[name].dtype, name
    # A few numbers may be rounded luckily, and the gradients of a sink and of
    # z are sums that cancel of outputs as they were rounded.
    few = want.size < 100 or name in ('dsink', 'dz0')
    floor = float(jnp.finfo(low).eps) / 2 if few else TOLERANCE
    limits[name] = 2 * _error(rounded[name], want) + floor
  _assert_within(got, exact, limits)


def _assert_within(got, want, limits):
  errors = {name: _error(got[name], want[name]) for name in want}
  wrong = {name: f'{error:.1e} > {limits[name]:.1e}'
           for name, error in errors.items() if not error <= limits[name]}
  assert not wrong, wrong


def _error(got, want):
  got, want = np.asarray(got), np.asarray(want)
  finite = np.isfinite(want)
  np.testing.assert_array_equal(got[~finite], want[~finite])
  return relative_rms(got[finite], want[finite])
