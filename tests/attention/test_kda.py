"""Kimi Delta Attention against its paper."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.attention import cases, delta
from tests.attention.oracles import float64


def oracle(mixer, x, *, positions, segment_ids):
  """Kimi Linear (2510.26692), equation 1 and section 4."""
  del segment_ids  # A document starts where its position is 0.
  dt = delta.low_rank(mixer.decay.project, x) + float64(mixer.decay.dt_bias)
  decay = -np.exp(float64(mixer.decay.A_log))[:, None] * delta.softplus(dt)
  return delta.layer(mixer, x, positions=positions, decay=decay,
                     gate=delta.sigmoid(delta.low_rank(mixer.gate, x)))


def test_equal_decays_are_those_of_gated_deltanet():
  """One decay for all channels of a head."""
  kda, gated = (nnx.clone(cases.build(cases.Case(name)))
                for name in ('kda', 'gated_deltanet'))
  for name in ('query', 'key', 'value', 'beta', 'norm', 'convs', 'out'):
    setattr(gated, name, getattr(kda, name))
  kda.gate, gated.gate = (lambda x: jnp.zeros((*x.shape[:2], 4, 8)),) * 2
  # sigmoid(0) is 1/2, silu(0) is 0: both stand for no gate here.
  kda.activation = gated.activation = lambda x: x + 1
  logs = -jnp.exp(cases.inputs(20)[..., :4])
  gated.decay = lambda x: logs
  kda.decay = lambda x: jnp.repeat(logs[..., None], 8, -1)
  x = cases.inputs(20, seed=1)
  cases.close(cases.plain(kda, x), cases.plain(gated, x), 1e-5)
