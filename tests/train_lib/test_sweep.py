"""Sweeps: every run once, whatever happens to one of them or to all."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.train_lib import runs
from train_lib import lock, preemption, results, trainer
from train_lib import sweep as sweep_lib

SMALL = '''
from configs.grid import product

def sweep():
  yield from product(attention_variant=['causal', 'identity'], seed=[1, 2])
'''
NAMES = [f'{variant},seed={seed}'
         for variant in ('causal', 'identity') for seed in (1, 2)]


pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture
def config(squares, tmp_path):
  """Of a sweep in tmp_path/runs, of four runs."""
  path = tmp_path / 'small.py'
  path.write_text(SMALL)
  return runs.small(
      squares, mode='sweep', sweep=str(path), workdir=str(tmp_path / 'runs'),
      max_iters=2, eval_interval=1, eval_final=True, dropout=0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Runs that write what a trainer does, and the order they are made in."""
  made = []

  def train(config, folder):
    made.append(folder.name)
    with lock.Lock(folder):
      (folder / 'config.json').write_text(json.dumps(config.to_dict()))
      (folder / 'metrics.jsonl').write_text(json.dumps(
          {'step': 2, 'val_loss': 1.0 + len(made), 'elapsed_s': 3.0}) + '\n')
      (folder / 'run.json').write_text(json.dumps(
          {'finished': config.max_iters}))
      print('a header')
  monkeypatch.setattr(trainer, 'train', train)
  monkeypatch.setattr(sweep_lib, 'POLL', 0.01)
  monkeypatch.setattr(sweep_lib, '_share_programs', lambda: None)
  return made


def said(config):
  """What a sweep prints."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    sweep_lib.sweep(config)
  return out.getvalue()


def states(config):
  return {r.name: r.state for r in results.find(config.workdir)}


def test_every_run_is_made_once(config, quick, tmp_path):
  out = said(config)
  assert quick == NAMES
  assert states(config) == dict.fromkeys(NAMES, 'finished')
  assert '[4/4]' in out and '\x1b' not in out and 'a header' not in out
  assert (tmp_path / 'runs' / NAMES[0] / 'log.txt').read_text() == 'a header\n'
  said(config)
  assert quick == NAMES


def test_a_dry_run_says_what_each_costs_and_leaves_nothing(config, tmp_path):
  config.dry_run = True
  out = said(config)
  assert all(name in out for name in NAMES) and 'FLOPs' in out
  assert not (tmp_path / 'runs').exists()


def test_a_shard_makes_its_own(config, quick):
  config.sweep_shard = '2/2'
  said(config)
  assert quick == NAMES[1::2]


@pytest.mark.parametrize('error, kept', [
    (OSError(28, 'No space left on device'), 'No space left'),
    (ValueError('step 2: loss nan'), 'step 2: loss nan'),
    (TypeError('unhashable'), 'TypeError: unhashable')])
def test_a_failure_is_kept_and_the_sweep_goes_on(
    error, kept, config, quick, monkeypatch, tmp_path):
  good = trainer.train

  def train(config, folder):
    if folder.name == NAMES[1]:
      raise error
    good(config, folder)
  with monkeypatch.context() as patch:
    patch.setattr(trainer, 'train', train)
    with pytest.raises(ValueError, match=f'1 of 4 runs failed.*{kept}'):
      said(config)
  assert quick == [NAMES[0], *NAMES[2:]]
  assert kept in (tmp_path / 'runs' / NAMES[1] / 'error.txt').read_text()
  assert states(config)[NAMES[1]] == 'failed'
  said(config)  # Tried again.
  assert quick[3:] == [NAMES[1]]
  assert states(config) == dict.fromkeys(NAMES, 'finished')


def test_a_run_of_another_process_is_looked_at_again(
    config, quick, monkeypatch, tmp_path):
  folder = tmp_path / 'runs' / NAMES[0]
  folder.mkdir(parents=True)
  held = lock.Lock(folder, sweep_lib.CLAIM)
  held.__enter__()
  def ends(_):
    trainer.train(config, folder)  # The other one does it.
    held.__exit__()
  monkeypatch.setattr(sweep_lib.time, 'sleep', ends)
  assert 'other processes' in said(config)
  assert sorted(quick) == sorted(NAMES)


def test_what_another_process_failed_at_is_not_tried_again(
    config, quick, tmp_path, monkeypatch):
  good = trainer.train

  def train(config, folder):
    good(config, folder)
    if folder.name == NAMES[0]:  # Meanwhile, elsewhere.
      other = tmp_path / 'runs' / NAMES[1]
      other.mkdir()
      (other / 'error.txt').write_text('diverged\n')
  monkeypatch.setattr(trainer, 'train', train)
  with pytest.raises(ValueError, match='diverged'):
    said(config)
  assert NAMES[1] not in quick


def test_a_signal_ends_the_sweep(config, monkeypatch):
  def train(config, folder):
    raise preemption.Stopped('one run')
  monkeypatch.setattr(trainer, 'train', train)
  with pytest.raises(preemption.Stopped, match='runs that are left'):
    said(config)


def test_a_folder_of_another_run_is_refused(config, quick):
  said(config)
  config.learning_rate = 0.5
  with pytest.raises(ValueError, match='learning_rate=0.01, the sweep has 0.5'):
    said(config)
  assert quick == NAMES


@pytest.mark.parametrize('flags, told', [
    ({'sweep': None}, 'needs --sweep'),
    ({'sweep_shard': '5/4'}, 'sweep_shard=5/4'),
    ({'dataset': '/nowhere'}, 'no file or folder')])
def test_mistakes_are_told_first(flags, told, config, quick):
  config.update(flags)
  with pytest.raises(ValueError, match=told):
    said(config)
  assert not quick


def start(config):
  """A process that makes a sweep."""
  path = config.workdir + '.json'
  with open(path, 'w') as file:
    json.dump({**config.to_dict()}, file)
  return subprocess.Popen(
      [sys.executable, 'main.py', f'--config={path}'], cwd=runs.ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
           'XDG_CACHE_HOME': config.workdir + '-cache'})


def ends(config):
  """{run: its last losses}, of a sweep that is done."""
  return {r.name: (r.state, r.last['loss'], r.last['val_loss_full'])
          for r in results.find(config.workdir)}


@pytest.mark.slow
def test_killed_twice_is_as_never_killed(config):
  config.update(max_iters=30, eval_interval=5)
  whole = start(config)
  assert whole.wait() == 0, whole.stdout.read()
  wanted = ends(config)
  config.workdir += '-killed'
  for run in ('causal,seed=1', 'identity,seed=1'):
    process = start(config)
    runs.await_checkpoints(process, f'{config.workdir}/{run}')
    process.kill()
    process.wait()
  last = start(config)
  assert last.wait() == 0, last.stdout.read()
  assert ends(config) == wanted


@pytest.mark.slow
def test_two_processes_share_a_sweep(config):
  config.max_iters = 30
  both = [start(config), start(config)]
  out = [process.communicate()[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], out
  begun = [line.split()[1] for text in out for line in text.splitlines()
           if 'begins' in line]
  assert sorted(begun) == sorted(NAMES)


@pytest.mark.slow
def test_a_signal_to_the_process(config):
  config.max_iters = 100_000
  process = start(config)
  runs.await_checkpoints(process, f'{config.workdir}/causal,seed=1')
  process.send_signal(signal.SIGTERM)
  assert process.wait() == 75
  assert 'runs that are left' in process.stdout.read()
