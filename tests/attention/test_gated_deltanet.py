"""Gated DeltaNet against its paper."""

import numpy as np

from tests.attention import cases, delta, oracles
from tests.attention.oracles import float64


def oracle(mixer, x, *, positions, segment_ids):
  """Yang et al. 2024 (2412.06464), equation 10, with the decay of Mamba-2."""
  del segment_ids  # A document starts where its position is 0.
  dt = oracles.dense(mixer.decay.project, x) + float64(mixer.decay.dt_bias)
  decay = -np.exp(float64(mixer.decay.A_log)) * delta.softplus(dt)
  return delta.layer(mixer, x, positions=positions, decay=decay,
                     gate=delta.silu(oracles.dense(mixer.gate, x)))


def test_decays_start_between_nearly_one_and_a_fifth():
  mixer = cases.build(cases.Case('gated_deltanet'), n_embd=2048, n_head=1024)
  decay = np.exp(np.asarray(mixer.decay(cases.inputs(4)[..., :1] * np.zeros(
      2048))))
  assert decay.max() < 1 and decay.max() > 0.998
  assert 0.15 < decay.min() < 0.3
