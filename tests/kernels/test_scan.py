"""Selective scan: the states between parts of a sequence, and its errors.

What all implementations promise is in test_contract.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels import scan
from attention.kernels.scan.gpu import states
from tests.kernels.ops import Scan


@pytest.mark.parametrize('reverse', [False, True])
def test_states_that_enter_parts(reverse):
  rng = np.random.default_rng(0)
  initial, ends, log_decay = (
      rng.standard_normal(shape) for shape in ((1, 3, 2), *[(1, 4, 3, 2)] * 2))
  cut = np.array([[False, True, False, False]])
  # A document that ends in a cut part may hold anything.
  ends[0, 0] = np.nan
  log_decay[0, 1] = np.inf
  got = states.entering(initial, ends, log_decay, cut, reverse=reverse)
  h, order = initial[0], range(4)[::-1] if reverse else range(4)
  for p in order:
    np.testing.assert_allclose(got[0, p], h, rtol=1e-5)
    through = 0 if cut[0, p] else np.exp(log_decay[0, p]) * h
    h = ends[0, p] + through


@pytest.mark.parametrize('blocks, chunks, number', [
    (256, 128, 1), (128, 128, 3), (32, 128, 9), (2, 128, 32), (2, 5, 1),
    (1, 1, 1), (2, 17, 4)])
def test_parts_fill_the_chip(blocks, chunks, number):
  assert states.number(blocks, chunks) == number
  length = -(-chunks // number)
  assert (number - 1) * length < chunks, 'no part is empty'


@pytest.mark.parametrize('change, message', [
    (dict(x=jnp.float16), 'x of dtype float16'),
    (dict(z=jnp.float16), 'z of dtype float16'),
], ids=['x', 'z'])
def test_tpu_declines_dtypes(change, message, on_tpu):
  arguments = Scan(T=10, has='z').arguments(jnp.float32)
  for name, dtype in change.items():
    arguments[name] = arguments[name].astype(dtype)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(functools.partial(
        scan.selective_scan, implementation='tpu'), **arguments)


@pytest.mark.parametrize('E, M, message', [
    (128, 65, 'M .65.'), (1 << 20, 16, 'shard the channels')])
def test_tpu_declines_sizes(E, M, message, on_tpu):
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  arguments = dict(
      x=struct(1, 8, E), dt=struct(1, 8, E), A=struct(E, M),
      B=struct(1, 8, M), C=struct(1, 8, M), D=struct(E))
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(functools.partial(
        scan.selective_scan, implementation='tpu'), **arguments)


@pytest.mark.parametrize('change, reason', [
    (dict(A=jnp.zeros((12, 65)), B=jnp.zeros((2, 8, 65)),
          C=jnp.zeros((2, 8, 65))), 'up to 64 states'),
    (dict(x=jnp.zeros((2, 8, 12), jnp.int32)), 'not int32, which x is'),
], ids=['M65', 'int32'])
def test_gpu_declines(change, reason, on_h100):
  arguments = Scan(T=8).arguments(jnp.float32) | change
  with pytest.raises(NotImplementedError, match=reason):
    scan.selective_scan(**arguments, implementation='gpu')


@pytest.mark.parametrize('change, message', [
    (dict(dt=jnp.zeros((2, 9, 12))), r'dt has shape \[2, 9, 12\].*T=10'),
    (dict(h0=jnp.zeros((2, 4, 12))), r'h0 has shape .*E=12, M=4'),
    (dict(starts=jnp.zeros((2, 9), bool)), r'starts has shape .*T=10'),
    (dict(implementation='cuda'), 'unknown implementation'),
], ids=['dt', 'h0', 'starts', 'implementation'])
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match=message):
    scan.selective_scan(**(Scan(T=10).arguments(jnp.float32) | change))


def test_the_plain_recurrence():
  rng = np.random.default_rng(0)
  x, log_decay = rng.standard_normal((2, 2, 40, 3))
  log_decay = -np.exp(log_decay)
  h = h0 = rng.standard_normal((2, 3))
  starts = np.zeros((2, 40), bool)
  starts[1, 17] = True
  got, last = scan.linear_recurrence(
      *(jnp.asarray(a, jnp.float32) for a in (x, log_decay)),
      h0=jnp.asarray(h0, jnp.float32), starts=jnp.asarray(starts))
  for t in range(40):
    kept = np.where(starts[:, t, None], 0.0, h)
    h = np.exp(log_decay[:, t]) * kept + x[:, t]
    np.testing.assert_allclose(got[:, t], h, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(last, h, rtol=1e-5, atol=1e-6)
