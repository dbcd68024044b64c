"""Workers: who gets what, and how they end."""

import os
import pathlib
import signal

import pytest

from configs import grid
from tests.train_lib import runs, test_sweep
from tests.train_lib.test_sweep import NAMES, ends, start
from train_lib import lock, workers
from train_lib import sweep as sweep_lib

pytestmark = pytest.mark.usefixtures('one_device')
config = test_sweep.config  # The fixture: a sweep of four runs.


@pytest.fixture
def gpus(monkeypatch, tmp_path):
  """A machine with three GPUs."""
  for name in ('0000:01', '0000:02', '0000:03'):
    (tmp_path / 'gpus' / name).mkdir(parents=True)
  monkeypatch.setattr(workers, 'GPUS', tmp_path / 'gpus')


@pytest.mark.parametrize('environment, count, dealt', [
    ({}, 2, ['0,2', '1']), ({}, 3, ['0', '1', '2']),
    ({'CUDA_VISIBLE_DEVICES': '5,7'}, 2, ['5', '7']),
    ({'JAX_PLATFORMS': 'cuda,cpu', 'CUDA_VISIBLE_DEVICES': 'GPU-a'}, 1,
     ['GPU-a'])])
def test_gpus_are_dealt_out(gpus, environment, count, dealt):
  places = workers.deal(count, environment)
  assert [v['CUDA_VISIBLE_DEVICES'] for v, _ in places] == dealt
  assert not any(cores for _, cores in places)


def test_no_more_workers_than_gpus(gpus):
  with pytest.raises(ValueError, match=r'sweep_workers \(4\) .* at most 3'):
    workers.deal(4, {})


@pytest.mark.parametrize('environment', [
    {'JAX_PLATFORMS': 'cpu'}, {'CUDA_VISIBLE_DEVICES': ''}])
def test_cores_are_dealt_out(gpus, environment, monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3, 4},
                      raising=False)
  assert workers.deal(2, environment) == [({}, {0, 2, 4}), ({}, {1, 3})]
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {6}, raising=False)
  assert workers.deal(2, environment) == [({}, {6}), ({}, {6})]


def test_workers_that_cannot_start(config, tmp_path, monkeypatch):
  main = tmp_path / 'main.py'
  main.write_text('raise SystemExit("no such device")')
  monkeypatch.setattr(workers, 'MAIN', main)
  monkeypatch.setattr(workers, 'POLL', 0.05)
  root = tmp_path / 'runs'
  root.mkdir()
  config.sweep_workers = 2
  with pytest.raises(ValueError, match='workers ended, and 4 runs are left'):
    workers.supervise(config, grid.load(config.sweep, config), root)
  assert 'no such device' in (root / 'workers' / '2.txt').read_text()
  config.sweep_shard = '2/3'  # Another machine may be at the first one.
  with pytest.raises(ValueError, match='workers/2-of-3 has what they said'):
    workers.supervise(config, grid.load(config.sweep, config), root)
  assert (root / 'workers' / '2-of-3' / 'flags.json').is_file()


@pytest.mark.slow
def test_two_workers_make_what_one_makes(config):
  config.max_iters = 20
  one = start(config)
  assert one.wait() == 0, one.stdout.read()
  wanted = ends(config)
  config.update(workdir=config.workdir + '-two', sweep_workers=2)
  two = start(config)
  said = two.communicate()[0]
  assert two.returncode == 0, said
  assert ends(config) == wanted
  assert all(f'{name}  val_loss_full' in said for name in NAMES)
  logs = pathlib.Path(config.workdir, 'workers').glob('*.txt')
  begun = [line.split()[1] for log in logs
           for line in log.read_text().splitlines() if 'begins' in line]
  assert sorted(begun) == sorted(NAMES)


@pytest.mark.slow
def test_a_signal_ends_the_workers(config):
  config.update(max_iters=100_000, sweep_workers=2)
  process = start(config)
  two = [f'{config.workdir}/{name}' for name in NAMES[:2]]
  runs.await_checkpoints(process, *two)
  process.send_signal(signal.SIGTERM)
  assert process.wait() == 75
  assert 'runs that are left' in process.stdout.read()
  for run in two:  # Nobody is at it any more, and what was done is saved.
    with lock.Lock(run, sweep_lib.CLAIM):
      assert runs.marks(run, max(map(int, os.listdir(f'{run}/checkpoints'))))
