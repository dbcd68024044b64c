"""Gated linear attention against its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.attention import cases, delta, oracles
from tests.attention.oracles import float64


def oracle(mixer, x, *, positions, segment_ids):
  """Yang et al. 2023, equations 3 and 4, section 4.4."""
  del segment_ids  # A document starts where its position is 0.
  q, k, v, gate = (oracles.dense(e, x) for e in (
      mixer.query, mixer.key, mixer.value, mixer.gate))
  decay = -delta.softplus(-delta.low_rank(mixer.decay, x)) / 16
  y = delta.recurrence(q / np.sqrt(q.shape[-1]), k, v, positions=positions,
                       decay=decay)
  y = oracles.rms(y) * float64(mixer.norm.weight)
  return oracles.dense(mixer.out, y * delta.silu(gate))


@pytest.mark.parametrize('bias', [-1e4, 0.0, 1e4])
def test_decays_at_their_ends(bias):
  """To 0 and to 1: finite, and so are all gradients."""
  mixer = nnx.clone(cases.build(cases.Case('gla')))
  mixer.decay.up.bias[...] = jnp.full_like(mixer.decay.up.bias[...], bias)
  loss = lambda mixer, x: (cases.plain(mixer, x) ** 2).sum()
  value, gradients = jax.value_and_grad(loss, (0, 1))(mixer, cases.inputs(70))
  for leaf in jax.tree.leaves((value, gradients)):
    assert np.isfinite(leaf).all()
