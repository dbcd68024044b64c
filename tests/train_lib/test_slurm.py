"""Sweeps by jobs of Slurm: what is submitted, and what a job then does."""

import contextlib
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time
import types

import pytest

from tests.train_lib import runs, test_sweep
from tests.train_lib.test_sweep import NAMES, said, states
from train_lib import slurm

pytestmark = pytest.mark.usefixtures('one_device')
config = test_sweep.config  # The fixture: a sweep of four runs.


@pytest.fixture
def submitit(monkeypatch):
  """A module of submitit's interface, and what it was given."""
  given = types.SimpleNamespace(jobs=[], parameters={}, made=[])

  class AutoExecutor:

    def __init__(self, **kwargs):
      given.made.append(kwargs)

    def update_parameters(self, **kwargs):
      given.parameters.update(kwargs)

    def batch(self):
      return contextlib.nullcontext()

    def submit(self, *call):
      given.jobs.append(call)
      return types.SimpleNamespace(job_id=f'42_{len(given.jobs) - 1}')

  monkeypatch.setitem(sys.modules, 'submitit', types.SimpleNamespace(
      AutoExecutor=AutoExecutor))
  return given


def test_each_job_is_main_with_a_shard(config, submitit, tmp_path):
  config.sweep_slurm = 3
  out = said(config)
  flags = tmp_path / 'runs' / 'slurm' / 'flags.json'
  assert submitit.jobs == [
      (os.execv, sys.executable, [
          sys.executable, str(runs.ROOT / 'main.py'), f'--config={flags}',
          f'--sweep_shard={i}/3']) for i in (1, 2, 3)]
  saved = json.loads(flags.read_text())
  assert saved['workdir'] == config.workdir and saved['sweep_slurm'] == 0
  assert saved['sweep'] == config.sweep and saved['mode'] == 'sweep'
  assert '3 jobs submitted: 42_0 42_1 42_2\n' in out
  assert f'python main.py --config={flags} --dry_run' in out
  assert submitit.made == [{'folder': flags.parent, 'cluster': 'slurm'}]
  assert states(config) == dict.fromkeys(NAMES, 'not begun')


def test_what_slurm_is_asked_for(config, submitit):
  config.update(sweep_slurm=2, sweep_slurm_args=(
      'partition=gpu time=90, gpus_per_node=1 mem=1.5 array_parallelism=4'))
  said(config)
  assert submitit.parameters == {
      'name': 'runs', 'timeout_min': 90, 'mem_gb': 1.5,
      'slurm_partition': 'gpu', 'slurm_gpus_per_node': 1,
      'slurm_array_parallelism': 4,
      'slurm_additional_parameters': {'signal': 'TERM@90', 'requeue': True}}


@pytest.mark.parametrize('flags, told', [
    ({'sweep_slurm': 5}, r'sweep_slurm \(5\) must be at most 4'),
    ({'sweep_slurm': 2, 'sweep_shard': '1/2'}, 'contradicts sweep_slurm'),
    ({'sweep_slurm_args': 'time=9'}, 'no effect without sweep_slurm'),
    ({'sweep_slurm': 2, 'sweep_slurm_args': 'tme=9'}, 'did you mean time'),
    ({'sweep_slurm': 2, 'sweep_slurm_args': 'time=0'}, 'at least 1'),
    ({'sweep_slurm': 2, 'sweep_slurm_args': 'time=soon'}, 'not an integer')])
def test_mistakes_are_told_first(flags, told, config, submitit, tmp_path):
  config.update(flags)
  with pytest.raises(ValueError, match=told) as error:
    said(config)
  assert '\n' not in str(error.value)
  assert not submitit.jobs and not (tmp_path / 'runs').exists()


def test_a_dry_run_submits_nothing(config, submitit):
  config.update(sweep_slurm=2, dry_run=True)
  assert NAMES[0] in said(config)
  assert not submitit.jobs


def test_submitit_is_missing(config, monkeypatch):
  monkeypatch.setitem(sys.modules, 'submitit', None)
  config.sweep_slurm = 2
  with pytest.raises(ImportError, match='needs submitit: pip install') as error:
    said(config)
  assert '\n' not in str(error.value)


@pytest.fixture
def cluster(monkeypatch, tmp_path):
  """A machine with an sbatch that keeps what it is given, as array job 42."""
  pytest.importorskip('submitit', reason='pip install -e ".[slurm]"')
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name, text in (('srun', ''), ('sbatch', (
      f'cp "$1" {tmp_path}/script.sh; echo Submitted batch job 42'))):
    (folder / name).write_text(f'#!/bin/sh\n{text}\n')
    (folder / name).chmod(stat.S_IRWXU)
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  return tmp_path / 'script.sh'


def test_the_script_that_sbatch_gets(config, cluster):
  config.update(sweep_slurm=2, sweep_slurm_args='partition=gpu time=90 mem=2')
  assert '2 jobs submitted: 42_0 42_1\n' in said(config)
  script = cluster.read_text()
  for line in ('array=0-1%2', 'partition=gpu', 'time=90', 'mem=2GB', 'requeue',
               'signal=TERM@90', 'job-name=runs', 'open-mode=append'):
    assert f'#SBATCH --{line}\n' in script


def test_no_slurm_here(config, cluster, monkeypatch):
  monkeypatch.setenv('PATH', '/nowhere')
  config.sweep_slurm = 2
  with pytest.raises(ValueError, match='no job could be submitted') as error:
    said(config)
  assert '\n' not in str(error.value)


def test_sbatch_refuses(config, cluster):
  (cluster.parent / 'bin' / 'sbatch').write_text(
      '#!/bin/sh\necho invalid partition >&2; exit 1\n')
  config.sweep_slurm = 2
  with pytest.raises(ValueError, match='invalid partition') as error:
    said(config)
  assert '\n' not in str(error.value)


def start(config, task):
  """The process that a job's node would start, of an array job's task."""
  return subprocess.Popen(
      [sys.executable, '-u', '-m', 'submitit.core._submit',
       f'{config.workdir}/slurm'], cwd=runs.ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
           'XDG_CACHE_HOME': config.workdir + '-cache',
           'SUBMITIT_EXECUTOR': 'slurm', 'SLURM_JOB_ID': f'{43 + task}',
           'SLURM_ARRAY_JOB_ID': '42', 'SLURM_ARRAY_TASK_ID': str(task)})


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_when_it_is_requeued(config, cluster):
  config.update(max_iters=200, eval_interval=5, sweep_slurm=2)
  said(config)
  job = start(config, 0)
  runs.await_checkpoints(job, f'{config.workdir}/{NAMES[0]}')
  job.send_signal(signal.SIGTERM)
  assert job.wait() == 75
  assert 'runs that are left' in job.stdout.read()
  both = [start(config, task) for task in (0, 1)]
  out = [job.communicate()[0] for job in both]
  assert [job.returncode for job in both] == [0, 0], out
  assert states(config) == dict.fromkeys(NAMES, 'finished')
  for shard, text in enumerate(out):
    assert all((name in text) == (NAMES.index(name) % 2 == shard)
               for name in NAMES)


@pytest.mark.slow
def test_jobs_of_this_machine(config, monkeypatch):
  pytest.importorskip('submitit', reason='pip install -e ".[slurm]"')
  monkeypatch.setattr(slurm, 'CLUSTER', 'local')
  config.update(max_iters=10, sweep_slurm=2)
  for name, value in (('JAX_PLATFORMS', 'cpu'), ('XLA_FLAGS', ''),
                      ('XDG_CACHE_HOME', config.workdir + '-cache')):
    monkeypatch.setenv(name, value)
  monkeypatch.chdir(runs.ROOT)
  said(config)
  end = time.monotonic() + 300
  while states(config) != dict.fromkeys(NAMES, 'finished'):
    time.sleep(0.2)
    assert time.monotonic() < end, [path.read_text() for path in pathlib.Path(
        config.workdir, 'slurm').glob('*.err')]
