"""Runs small enough to be trained in a test, and what is read of them."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from configs import default
from train_lib import checkpoints, sharding

ROOT = pathlib.Path(__file__).parents[2]


def small(dataset, **flags):
  """The config of a small run; runs of any length share a schedule."""
  config = default.get_config()
  config.update(
      dataset=dataset, n_layer=2, n_head=2, n_embd=16, block_size=16,
      batch_size=8, max_iters=30, eval_interval=15, eval_iters=2,
      log_interval=1, warmup_iters=2, lr_decay_iters=60, learning_rate=1e-2,
      dropout=0.1, eval_final=False, max_new_tokens=4, mesh_data=1)
  config.update(flags)
  return config


def set_mesh(config, mesh):
  """Asks for data x fsdp x tensor devices."""
  config.update(
      {f'mesh_{axis}': n for axis, n in zip(sharding.AXES, mesh, strict=True)})


@contextlib.contextmanager
def devices(number):
  """As if there were so many devices; programs of one compile fastest."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: number)
    yield


def losses(history):
  """The training losses of a history."""
  return [row['loss'] for row in history if 'loss' in row]


def marks(workdir, step):
  """The fingerprint of a checkpoint."""
  with checkpoints.Checkpoints(workdir, read_only=True) as store:
    return store.meta(step)['fingerprint']


def start_main(config, workdir, **environment):
  """A process of main.py on one CPU device, or as the environment says."""
  path = pathlib.Path(workdir).with_suffix('.json')
  path.write_text(json.dumps(config.to_dict()))
  return subprocess.Popen(
      [sys.executable, 'main.py', f'--config={path}', f'--workdir={workdir}'],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
           **environment})


def await_checkpoints(process, *folders):
  """Until every run has one, whichever: the first ones are deleted again."""
  has_one = lambda folder: any(path.name.isdigit() for path in pathlib.Path(
      folder).glob('checkpoints/*'))
  while not all(map(has_one, folders)):
    time.sleep(0.05)
    assert process.poll() is None, process.stdout.read()
