"""What the runs of a sweep cost.

Known from shapes alone: no array is made.
"""

import dataclasses
import json
import os
import pathlib

from configs import default
from train_lib import metrics, results
from train_lib import run as run_lib

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


def shape(config):
  """What runs that cost the same have in common, as text."""
  return json.dumps({flag: value for flag, value in config.to_dict().items()
                     if flag not in _FREE})


def opened(point):
  """The run of a point, without a folder; ValueError if it cannot be."""
  try:
    run_lib.check(point.config)
    return run_lib.open_run(point.config, point.name, read_only=True)
  except ValueError as error:
    raise ValueError(f'run {point.name}: {error}') from None


def costs(points):
  """The Cost of each point of a sweep.

  Raises:
    ValueError: one line on a run that cannot be; data are read, and found
      missing, here.
  """
  runs = {}
  found = []
  for point in points:
    config, key = point.config, shape(point.config)
    if key not in runs:
      run = opened(point)
      runs[key] = (
          run.model.n_params(), run.model.state_bytes(),
          run.flops_per_token() * config.batch_size * run.config.block_size)
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


def cache_folder():
  """Where compiled programs are kept for the next run or sweep."""
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(os.path.expanduser(cache)) / 'attention-lab' / 'compiled'
