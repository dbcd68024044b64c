"""The delta rule: where it could lose digits, and what it may not keep.

What all implementations promise is in test_contract.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels import delta
from tests.kernels import ops
from tests.kernels.measure import largest_buffer, relative_rms
from tests.kernels.ops import Delta


def exact(q, k, v, beta, decay):
  """y [T,V] of one head in float64, step by step."""
  q, k, v, beta, decay = (
      np.asarray(x, np.float64) for x in (q, k, v, beta, decay))
  S, y = np.zeros((k.shape[1], v.shape[1])), np.zeros(v.shape)
  for t in range(len(q)):
    S = np.exp(decay[t])[:, None] * S
    S += np.outer(k[t], beta[t] * (v[t] - k[t] @ S))
    y[t] = q[t] @ S
  return y


@pytest.mark.slow
@pytest.mark.parametrize('forgets', [1e-4, 1.0], ids=['slowly', 'soon'])
def test_32k_tokens_in_bfloat16(forgets):
  """As far from float64, of the same rounded inputs, as one rounding of y."""
  row = Delta(B=1, T=32_768, N=1, K=1, H=16, V=16, channels=True,
              has='beta decay')
  operands = row.arguments(jnp.bfloat16)
  operands['decay'] = forgets * operands['decay']
  y, S = jax.jit(delta.delta_rule)(**operands)
  assert y.dtype == jnp.bfloat16 and np.isfinite(S).all()
  q, k, v = (operands[name][0, :, 0].astype(jnp.float32) for name in 'qkv')
  want = exact(q, k, v, operands['beta'][0, :, 0], operands['decay'][0, :, 0])
  assert relative_rms(y[0, :, 0], want) < 3e-3


@pytest.mark.parametrize('channels', [False, True], ids=['head', 'channel'])
def test_memory_is_that_of_the_operands(channels):
  """No pairs of steps, and no states but one of each group."""
  row = Delta(B=1, T=4096, N=2, K=2, H=64, V=64, channels=channels,
              has='beta decay')
  run = functools.partial(ops.run, ops.function(Delta, functools.partial(
      row.op, implementation='xla'), {}))
  program = jax.jit(run).lower(
      row.arguments(jnp.float32), row.cotangents()).compile()
  assert largest_buffer(program) <= row.T * row.N * row.H


def test_jacobians_of_many_rows():
  """vmap of a gradient, whose sums XLA:CPU must not crash on."""
  row = Delta(B=2, T=12, has='beta decay', channels=True)
  operands = row.arguments(jnp.float32)
  function = lambda q: delta.delta_rule(**dict(operands, q=q))[0].sum((0, 3))
  forward_over = jax.jit(jax.jacrev(function))(operands['q'])
  one = jax.grad(lambda q: function(q)[5, 1])(operands['q'])
  np.testing.assert_allclose(forward_over[5, 1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('arrays, message', [
    (dict(v=(2, 4, 2, 6)), r'v has shape \[2, 4, 2, 6\]'),
    (dict(beta=(2, 5)), 'beta has shape'),
    (dict(decay=(2, 5, 2, 6)), r'decay .* give it \[B=2, T=5, K=2, H=8\]'),
    (dict(q=(2, 5, 3, 8)), 'q has 3 heads, no multiple of the 2 of k'),
])
def test_what_does_not_fit(arrays, message):
  shapes = dict(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 6)) | arrays
  with pytest.raises(ValueError, match=message):
    delta.delta_rule(**{name: jnp.zeros(x) for name, x in shapes.items()})
