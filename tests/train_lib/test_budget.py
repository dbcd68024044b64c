"""What runs cost, from shapes alone, and equal numbers of parameters."""

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


def n_params(point, workdir):
  return run.open_run(point.config, workdir).model.n_params()


def test_costs_are_those_of_the_run(points, one_device, tmp_path):
  for point, cost in zip(points, budget.costs(points)):
    opened = run.open_run(point.config, tmp_path)
    config, module = opened.config, opened.model.module
    tokens = config.max_iters * config.batch_size * config.block_size
    assert cost.parameters == opened.model.n_params()
    assert cost.flops == tokens * opened.flops_per_token()
    whole, per_token = module.state_bytes()
    assert cost.state_bytes == whole + per_token * config.block_size


def test_matched_runs_have_the_parameters_of_the_first(
    points, one_device, tmp_path, capsys):
  found = budget.matched(points, 'params')
  wanted, *others = [n_params(point, tmp_path) for point in found]
  assert n_params(points[1], tmp_path) != wanted
  # A step of the width is that many parameters of every layer.
  step = 2 * points[0].config.n_embd * points[0].config.n_layer
  assert all(abs(other - wanted) <= step / 2 for other in others)
  assert 'causal: mlp_width' in capsys.readouterr().out
  assert found[0].config.mlp_width is not None
  assert points[0].config.mlp_width is None


def test_unmatched_runs_are_left_as_they_are(points):
  assert budget.matched(points, 'none') is points


def test_a_width_of_its_own_contradicts(points):
  points[1].given['mlp_width'] = 8
  with pytest.raises(ValueError, match='causal sets it'):
    budget.matched(points, 'params')


def test_a_model_that_is_too_large_without_any_mlp(points):
  with pytest.raises(ValueError, match='ssm has more than'):
    budget.matched(points[::-1], 'params')
