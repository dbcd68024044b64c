"""Two processes are one run."""

import json
import socket

import numpy as np
import pytest

from tests.train_lib import runs
from train_lib import distributed

DEVICES = '--xla_force_host_platform_device_count='


@pytest.mark.slow
def test_two_processes_train_as_one(config, tmp_path):
  config.update(mesh_data=2, mesh_fsdp=4, dropout=0.0, eval_final=True)
  one = runs.start_main(config, tmp_path / 'one', XLA_FLAGS=DEVICES + '8')
  out = one.communicate(timeout=300)[0]
  assert one.returncode == 0, out
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  two = [runs.start_main(
      config, tmp_path / 'two', XLA_FLAGS=DEVICES + '4',
      JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}', JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(i)) for i in range(2)]
  for process in two:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
  rows = [[json.loads(row) for row in
           (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
          for name in ('one', 'two')]
  for a, b in zip(*rows, strict=True):
    for name in ('loss', 'val_loss', 'val_loss_full'):
      if name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-5)


def test_what_a_launcher_says(monkeypatch):
  joined = []
  monkeypatch.setattr(
      distributed.jax.distributed, 'initialize',
      lambda *args: joined.append(args))
  for name in ('JAX_COORDINATOR_ADDRESS', 'SLURM_STEP_NUM_TASKS',
               'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.delenv(name, raising=False)
  distributed.join('auto')
  assert not joined
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'one,two')
  distributed.join('no')
  assert not joined
  distributed.join('auto')
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'host:1234')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '4')
  monkeypatch.setenv('JAX_PROCESS_ID', '3')
  distributed.join('auto')
  assert joined == [(), ('host:1234', 4, 3)]


@pytest.mark.parametrize('given', [
    {'JAX_COORDINATOR_ADDRESS': 'host:1'},
    {'JAX_COORDINATOR_ADDRESS': 'host:1', 'JAX_NUM_PROCESSES': '2'},
    {'JAX_COORDINATOR_ADDRESS': 'host:1', 'JAX_NUM_PROCESSES': 'two',
     'JAX_PROCESS_ID': '0'}], ids=len)
def test_half_of_what_a_launcher_says_is_one_line(monkeypatch, given):
  for name in distributed.BY_HAND:
    monkeypatch.delenv(name, raising=False)
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(
      distributed.jax.distributed, 'initialize', lambda *_: pytest.fail())
  with pytest.raises(ValueError, match='JAX_NUM_PROCESSES|invalid') as error:
    distributed.join('auto')
  assert '\n' not in str(error.value)
