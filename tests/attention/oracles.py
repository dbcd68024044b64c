"""The oracle of every variant: NumPy in float64, written from its paper.

An oracle is a function

  oracle(mixer, x, *, positions, segment_ids) -> y

of the Attention module, whose parameters and options it reads and whose code
it never calls, and of float64 x [B,T,D], int positions [B,T] and segment_ids
[B,T]. It lives as `oracle` in tests/attention/test_<variant>.py; short ones
are here.
"""

import importlib
import importlib.util

import numpy as np


def identity(mixer, x, *, positions, segment_ids):
  del mixer, positions, segment_ids
  return x


HERE = {'identity': identity}


def find(name):
  """The oracle of a variant; AssertionError that says how to add one."""
  if name in HERE:
    return HERE[name]
  module = f'tests.attention.test_{name}'
  found = importlib.util.find_spec(module)
  oracle = found and getattr(importlib.import_module(module), 'oracle', None)
  assert oracle, (
      f'the variant {name!r} has no oracle: write its equations as a NumPy '
      f'loop, `oracle(mixer, x, *, positions, segment_ids)`, in '
      f'tests/attention/test_{name}.py (see tests/attention/oracles.py)')
  return oracle


def dense(module, x):
  """x [B,T,...] times the weight of an Einsum, plus its bias."""
  bias = 0.0 if module.bias is None else float64(module.bias)
  return np.tensordot(x, float64(module.weight), module.n_contracted) + bias


def float64(parameter):
  return np.asarray(parameter[...], np.float64)


def gated(gate, x, y):
  """Qiu et al. 2025, equation 6: what a Gate makes of the heads y [B,T,N,V]."""
  if gate.project is None:
    return y
  return y / (1 + np.exp(-dense(gate.project, x)))


def rms(x, eps=1e-6):
  """x over its root mean square along the last axis."""
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rotate(x, positions, base, fraction=1.0):
  """Rotary embeddings as complex numbers (Su et al. 2021, eq. 12).

  Args:
    x: [B,T,N,H].
    positions: [B,T].
    base: of the wavelengths.
    fraction: of the head's numbers, the first of which are rotated in pairs.
  """
  x, still = np.split(x, [2 * max(int(fraction * x.shape[-1] / 2), 1)], -1)
  half = x.shape[-1] // 2
  z = x[..., :half] + 1j * x[..., half:]
  angle = positions[:, :, None, None] / base ** (np.arange(half) / half)
  z = z * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag, still], -1)
