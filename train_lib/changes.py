"""What is not as it was when a run is resumed: refused, or told."""

import dataclasses
import json

from configs import default

# Flags that change no number of a run.
HARMLESS = {field.name for field in dataclasses.fields(default.Sampling)} | {
    'workdir', 'mode', 'allow_changed_data'}


def lines(saved, config, step):
  """A line for every flag that has another value than it had.

  Args:
    saved: the config of a checkpoint, as JSON.
    config: the config that the run goes on with.
    step: of the checkpoint.
  """
  now = json.loads(json.dumps(config.to_dict()))
  # A run that is older than a flag had its default.
  before = {flag: saved.get(flag, field.default)
            for flag, field in default.fields().items()}
  return [f'changed since step {step}: {flag} {before[flag]} -> {now[flag]}'
          for flag in before
          if flag not in HARMLESS and before[flag] != now[flag]]


def check_data(meta, run):
  """Raises ValueError if the data are not those of a checkpoint.

  Args:
    meta: what the checkpoint says of its run, as of Run.meta.
    run: the Run that is to go on with it.
  """
  before, now = meta['dataset_sha256'], run.dataset.sha256
  if before != now and not run.config.allow_changed_data:
    raise ValueError(
        f'the content of --dataset={run.config.dataset} is not what '
        f'{run.workdir} was trained on (SHA-256 {now[:12]}, then '
        f'{before[:12]}): give --allow_changed_data to go on, or use another '
        '--workdir')
