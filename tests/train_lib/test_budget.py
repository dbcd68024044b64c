"""What runs cost, from shapes alone."""

import pytest

from configs import grid
from train_lib import budget, run


@pytest.fixture
def points(config):
  """Of three variants, of three sizes."""
  names = ('ssm', 'causal', 'linear')
  found = []
  for name in names:
    own = config.copy_and_resolve_references()
    own.attention_variant = name
    found.append(grid.Point(name, own, {'attention_variant': name}))
  return found


def test_costs_are_those_of_the_run(points, one_device, tmp_path):
  for point, cost in zip(points, budget.costs(points)):
    opened = run.open_run(point.config, tmp_path)
    config, module = opened.config, opened.model.module
    tokens = config.max_iters * config.batch_size * config.block_size
    assert cost.parameters == opened.model.n_params()
    assert cost.flops == tokens * opened.flops_per_token()
    whole, per_token = module.state_bytes()
    assert cost.state_bytes == whole + per_token * config.block_size
