"""What the runs of a sweep cost, and giving all of them as much of something.

Known from shapes alone: no array is made.
"""

import dataclasses
import json
import os
import pathlib

from configs import default
from train_lib import metrics, results
from train_lib import run as run_lib
from train_lib.state import AbstractModel

# Flags that no shape depends on: runs that differ in these cost the same.
_FREE = {'seed', 'max_iters', 'stop_when', 'log_interval', 'eval_interval',
         *default.Optimizer.__dataclass_fields__}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a run.

  Attributes:
    parameters: of the model.
    state_bytes: that decoding block_size tokens of a sequence keeps.
    flops: of all steps of the training.
  """
  parameters: int
  state_bytes: int
  flops: float


def costs(points):
  """The Cost of each point of a sweep.

  Raises:
    ValueError: one line on a run that cannot be; data are read, and found
      missing, here.
  """
  runs = {}
  found = []
  for point in points:
    config = point.config
    key = json.dumps({flag: value for flag, value in config.to_dict().items()
                      if flag not in _FREE})
    if key not in runs:
      try:
        run_lib.check(config)
        run = run_lib.open_run(config, point.name, read_only=True)
      except ValueError as error:
        raise ValueError(f'run {point.name}: {error}') from None
      constant, per_token = run.model.module.state_bytes()
      runs[key] = (
          run.model.n_params(), constant + config.block_size * per_token,
          run.flops_per_token() * config.batch_size * config.block_size)
    parameters, state, flops = runs[key]
    found.append(Cost(parameters, state, flops * config.max_iters))
  return found


def table(points, costs, root):
  """The list of runs, with what each costs, as text."""
  rows = [('run', 'state', 'parameters', 'state bytes', 'FLOPs')]
  for point, cost in zip(points, costs):
    found = results.read(root / point.name)
    rows.append((
        point.name, found.state if found else 'new', f'{cost.parameters:,}',
        f'{cost.state_bytes:,}', f'{cost.flops:.2e}'))
  total = sum(cost.flops for cost in costs)
  return (f'{len(points)} runs in {root}, {total:.2e} FLOPs of training; the '
          'state decodes block_size tokens of one sequence\n\n'
          + metrics.columns_of(rows))


def matched(points, what):
  """The points, each with as many parameters as the first: --match=params.

  Args:
    points: a list of grid.Points.
    what: 'none' leaves them as they are.

  Raises:
    ValueError: a run sets mlp_width itself, or is too large without any mlp.
  """
  if what == 'none':
    return points
  for point in points:
    if 'mlp_width' in point.given:
      raise ValueError(f'--match={what} chooses mlp_width, but run {point.name}'
                       ' sets it: leave one of them out')
  first = points[0].config
  wanted, widths, found = _n_params(first, first.mlp_width), {}, []
  for point in points:
    config = point.config.copy_and_resolve_references()
    key = json.dumps({flag: value for flag, value in config.to_dict().items()
                      if flag not in _FREE})
    if key not in widths:
      widths[key] = mlp_width(config, wanted, point.name)
      apart = _n_params(config, widths[key]) - wanted
      print(f'{point.name}: mlp_width {widths[key]} gives it {apart:+,} '
            'parameters beside the first run')
    config.mlp_width = widths[key]
    found.append(dataclasses.replace(point, config=config))
  return found


def mlp_width(config, wanted, name='the model'):
  """The width of the mlp that brings a model closest to `wanted` parameters.

  Raises:
    ValueError: it has more without any mlp.
  """
  base = 4 * config.n_embd
  one = _n_params(config, base + 1) - _n_params(config, base)
  width = base + round((wanted - _n_params(config, base)) / one)
  if width < 1:
    raise ValueError(
        f'--match=params: {name} has more than {wanted:,} parameters without '
        'any mlp: give the first run more of them')
  return width


def _n_params(config, width):
  config = config.copy_and_resolve_references()
  config.mlp_width = width
  config.vocab_size = config.vocab_size or 256  # The same in all of them.
  return AbstractModel(config).n_params()


def cache_folder():
  """Where compiled programs are kept for the next run or sweep."""
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(os.path.expanduser(cache)) / 'attention-lab' / 'compiled'
