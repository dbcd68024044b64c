"""run.json: what a run is made of, where it runs, and whether it has ended.

Beside config.json, which says what was asked for, it keeps what a comparison
of runs needs to know without building their models or asking their machine.
"""

import functools
import json
import pathlib
import shlex
import subprocess
import sys
import time

import jax

from train_lib import disk, report

NAME = 'run.json'


def begin(run, choices):
  """Writes the record of a run that starts or goes on.

  Args:
    run: the Run.
    choices: what dispatch recorded while the step was traced.
  """
  if jax.process_index():
    return
  devices = jax.devices()
  constant, per_token = run.model.module.state_bytes()
  disk.write_json(run.workdir / NAME, {
      'started': time.strftime('%Y-%m-%d %H:%M:%S'),
      'command': shlex.join(['python', *sys.argv]),
      'commit': commit(),
      'jax': jax.__version__,
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'kernels': report.kernels(choices),
      'parameters': run.model.n_params(),
      'state_bytes': constant,
      'state_bytes_per_token': per_token,
      'flops_per_token': run.flops_per_token(),
      'dataset_sha256': run.dataset.sha256,
      'finished': None})


def finish(run, state):
  """Says in the record that the run has ended, and at which step.

  Before max_iters it ends because it got to what stop_when says.
  """
  step = int(state.step)
  if jax.process_index() == 0:
    disk.write_json(run.workdir / NAME, {
        **read(run.workdir), 'finished': step, 'stopped_when': (
            run.config.stop_when if step < run.config.max_iters else None)})


def read(workdir):
  """The record in a folder; {} where there is none that can be read."""
  try:
    found = json.loads((pathlib.Path(workdir) / NAME).read_text())
    return found if isinstance(found, dict) else {}
  except (OSError, ValueError):
    return {}


@functools.cache
def commit():
  """The commit of this code, with '+' if files differ from it; or None."""
  folder = pathlib.Path(__file__).parent
  git = lambda *words: subprocess.run(
      ['git', '-C', folder, *words], capture_output=True, text=True,
      check=True, timeout=10).stdout.strip()
  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', '--short=12', 'HEAD') + '+' * bool(changed)
  except (OSError, subprocess.SubprocessError):
    return None  # An installed package, or no git.
