"""HGRN2 against its paper."""

import dataclasses

import numpy as np

from model.sharding import Context
from tests.attention import cases, delta, oracles
from tests.attention.oracles import float64


def oracle(mixer, x, *, positions, segment_ids, depth=0):
  """Qin et al. 2024, equations 7 and 9."""
  del segment_ids  # A document starts where its position is 0.
  lower = mixer.options.hgrn2_lower_bound
  lower = depth / mixer.n_layer if lower is None else lower
  f = lower + (1 - lower) * delta.sigmoid(oracles.dense(mixer.forget, x))
  y = delta.recurrence(
      delta.silu(oracles.dense(mixer.query, x)), 1 - f,
      oracles.dense(mixer.value, x), positions=positions, decay=np.log(f))
  return oracles.dense(mixer.out, oracles.rms(y) * float64(mixer.norm.weight))


def test_the_lower_bound_grows_with_depth():
  mixer, x = cases.build(cases.Case('hgrn2'), n_layer=8), cases.inputs(12)
  ctx = Context(cases.counted(x))
  for depth in (0, 5):
    got, _ = mixer(x, dataclasses.replace(ctx, depth=depth))
    cases.close(got, oracle(
        mixer, np.asarray(x, np.float64), positions=np.asarray(ctx.positions),
        segment_ids=None, depth=depth), 1e-5)
