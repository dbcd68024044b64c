"""DeltaNet against its paper, and what a step may do to the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention.common.ops import delta_rule
from model.sharding import Context
from tests.attention import cases, delta, oracles


def oracle(mixer, x, *, positions, segment_ids):
  """Yang et al. 2024 (2406.06484), equation 3 and figure 1."""
  del segment_ids  # A document starts where its position is 0.
  return delta.layer(mixer, x, positions=positions, decay=None,
                     gate=delta.silu(oracles.dense(mixer.gate, x)))


def test_a_key_that_is_written_again_is_replaced():
  k = jnp.tile(jax.nn.one_hot(0, 4), (1, 3, 1, 1))
  v = jnp.arange(1.0, 4.0)[None, :, None, None]
  ctx = Context(jnp.arange(3)[None])
  y, _ = delta_rule(k, k, v, ctx, beta=jnp.ones((1, 3, 1)))
  np.testing.assert_allclose(y[0, :, 0, 0], [1, 2, 3], atol=1e-6)


def test_beta_of_two_counts_parity():
  """Every 1 reflects the state along one key: no diagonal decay can."""
  bits = np.random.default_rng(0).integers(0, 2, 300)
  start = np.arange(301) == 0  # Writes the state that is then reflected.
  k = np.where(start[:, None], [1.0, 0.0], [1.0, 0.0])[None, :, None]
  v = np.where(start, 1.0, 0.0)[None, :, None, None]
  beta = np.where(start, 1.0, 2.0 * np.append(0, bits))[None, :, None]
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  y, _ = delta_rule(f32(k), f32(k), f32(v), Context(jnp.arange(301)[None]),
                    beta=f32(beta))
  parity = 1 - 2 * (np.append(0, bits).cumsum() % 2)
  np.testing.assert_allclose(y[0, :, 0, 0], parity, atol=1e-4)


@pytest.mark.parametrize('bias', [-200.0, 0.0, 200.0])
@pytest.mark.parametrize('most', [1.0, 2.0])
def test_beta_at_its_ends(bias, most):
  """Exactly 0, 1 and 2: finite, and so are all gradients."""
  mixer = nnx.clone(cases.build(cases.Case(
      'deltanet', 'ends', (('delta_beta_max', most), ('bias', True)))))
  x = cases.inputs(40).at[:, :, 0].set(bias)
  mixer.beta.weight[...] = jnp.zeros_like(
      mixer.beta.weight[...]).at[0].set(jnp.sign(bias) * jnp.abs(bias) / 200)
  loss = lambda mixer, x: (cases.plain(mixer, x) ** 2).sum()
  value, gradients = jax.value_and_grad(loss, (0, 1))(mixer, x)
  for leaf in jax.tree.leaves((value, gradients)):
    assert np.isfinite(leaf).all()
