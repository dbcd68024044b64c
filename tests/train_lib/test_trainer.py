"""The loop: it learns, resumes bit for bit, and stops where it should."""

import errno
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest

from tests.train_lib import runs
from tests.train_lib.runs import losses, marks
from train_lib import checkpoints, corpus, metrics, trainer
from train_lib import run as run_lib
from train_lib.evaluate import Evaluator
from train_lib.lock import Lock
from train_lib.preemption import Stopped


def test_learns(trained):
  history = trained.history
  assert losses(history)[-1] < losses(history)[0] - 1
  assert history[-1]['val_loss_full'] == pytest.approx(
      history[-2]['val_loss'], rel=0.1)


@pytest.fixture
def at_step(monkeypatch):
  """Calls a function when a step is dispatched: at_step(step, function)."""
  add = metrics.Meter.add

  def when(step, function):
    def add_and_call(meter, values):
      add(meter, values)
      if meter.step == step:
        function()
    monkeypatch.setattr(metrics.Meter, 'add', add_and_call)
  yield when


def rows_of(workdir):
  return [json.loads(row)
          for row in (workdir / 'metrics.jsonl').read_text().splitlines()]


def in_sum(rows):
  """Rows without what depends on the clock."""
  clock = {'elapsed_s', 'ms_per_step', 'tokens_per_s', 'val_loss_full',
           'val_tokens', 'bits_per_byte'}
  return [row for row in ({k: v for k, v in row.items() if k not in clock}
                          for row in rows) if len(row) > 2]


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_resumes_bit_for_bit(config, trained, tmp_path, at_step, number):
  # A signal in the middle of step 4: the step is finished, saved, left.
  workdir = tmp_path / 'parts'
  at_step(4, lambda: os.kill(os.getpid(), number))
  with pytest.raises(Stopped, match='goes on from step 4'):
    trainer.train(config, workdir)
  assert len(rows_of(workdir)) == 4
  at_step(None, None)
  trainer.train(config, workdir)
  assert in_sum(rows_of(workdir)) == in_sum(rows_of(trained.workdir))
  assert marks(workdir, 30) == marks(trained.workdir, 30)


@pytest.mark.usefixtures('one_device')
def test_rows_after_a_resume_are_over_the_same_steps(
    config, tmp_path, at_step):
  config.update(max_iters=14, log_interval=7, eval_interval=0)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  trainer.train(config, whole)
  at_step(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
  with pytest.raises(Stopped):
    trainer.train(config, parts)
  at_step(None, None)
  trainer.train(config, parts)
  assert in_sum(rows_of(parts)) == in_sum(rows_of(whole))
  last = rows_of(parts)[-1]
  assert last['tokens'] == 14 * config.batch_size * config.block_size
  elapsed = [row['elapsed_s'] for row in rows_of(parts)]
  assert elapsed == sorted(elapsed)


@pytest.mark.usefixtures('one_device')
def test_a_signal_in_the_final_evaluation_is_noticed(
    config, tmp_path, monkeypatch):
  config.update(max_iters=2, eval_final=True)
  full, seen = corpus.Dataset.full_batch, []

  def full_batch(*args, **kwargs):
    seen.append(kwargs['index'])
    if kwargs['index'] == 1:
      os.kill(os.getpid(), signal.SIGINT)
    return full(*args, **kwargs)
  monkeypatch.setattr(corpus.Dataset, 'full_batch', full_batch)
  with pytest.raises(KeyboardInterrupt):
    trainer.train(config, tmp_path / 'run')
  assert seen == [0, 1]
  monkeypatch.setattr(corpus.Dataset, 'full_batch', full)
  history = trainer.train(config, tmp_path / 'run')
  assert history[-1]['step'] == 2 and 'val_loss_full' in history[-1]


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('method', ['_show', 'say'])
def test_a_row_that_cannot_be_written_ends_the_run_saved(
    config, tmp_path, at_step, monkeypatch, method):
  def full(*args):
    raise OSError(errno.ENOSPC, 'No space left on device')
  at_step(3, lambda: monkeypatch.setattr(metrics.Logger, method, full))
  with pytest.raises(OSError, match='metrics of step 3 .*No space') as error:
    trainer.train(config, tmp_path)
  monkeypatch.undo()
  assert '\n' not in str(error.value)
  with checkpoints.Checkpoints(tmp_path, read_only=True) as store:
    assert store.steps() == [4]


@pytest.mark.usefixtures('one_device')
def test_a_workdir_that_goes_away_is_told(config, tmp_path, at_step):
  workdir = tmp_path / 'run'
  config.checkpoint_interval = 4  # No save is under way at step 3.
  at_step(3, lambda: shutil.rmtree(workdir))
  with pytest.raises(OSError, match='deleted or replaced'):
    trainer.train(config, workdir)
  assert not workdir.exists()


@pytest.mark.usefixtures('one_device')
def test_two_in_one_workdir_are_refused(config, workdir):
  before = (workdir / 'metrics.jsonl').read_bytes()
  with Lock(workdir), pytest.raises(ValueError, match='in use by process'):
    trainer.train(config, workdir)
  assert (workdir / 'metrics.jsonl').read_bytes() == before


@pytest.mark.usefixtures('one_device')
def test_flags_of_the_loop_may_change(config, workdir):
  config.update(max_iters=31, learning_rate=1e-4, remat='full', batch_size=4)
  assert len(losses(trainer.train(config, workdir))) == 1


def steps_of(workdir):
  with checkpoints.Checkpoints(workdir, read_only=True) as store:
    return store.steps()


BREAKS = {'learning_rate': 1e30, 'warmup_iters': 0, 'grad_clip': 0.0,
          'lr_schedule': 'constant'}


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('policy,patience,after', [
    ('stop', 1, 'step 6: loss'), ('skip', 3, 'step 8: .*, 3 steps in a row')])
def test_the_update_that_broke_the_model_is_not_gone_on_from(
    config, tmp_path, policy, patience, after):
  config.update(max_iters=4, checkpoint_interval=1, eval_interval=0)
  trainer.train(config, tmp_path)
  config.update(max_iters=20, nan_policy=policy, nan_patience=patience)
  with config.unlocked():
    broken = config.copy_and_resolve_references()
  broken.update(BREAKS)
  for _ in range(2):
    with pytest.raises(metrics.Diverged, match=f'{after}.* of step 4') as error:
      trainer.train(broken, tmp_path)
    assert '\n' not in str(error.value)
    assert steps_of(tmp_path) == [3, 4]
  rows = rows_of(tmp_path)
  assert rows[-1]['grad_norm'] is None and rows[-1]['step'] > 5
  config.max_iters = 6
  assert len(losses(trainer.train(config, tmp_path))) == 2


@pytest.mark.usefixtures('one_device')
def test_a_run_that_skips_everything_fails(config, tmp_path):
  config.update(BREAKS, max_iters=6, nan_policy='skip', log_interval=2)
  with pytest.raises(metrics.Diverged, match='step 6: it was skipped.* '
                     '5 steps in a row.* next start begins anew'):
    trainer.train(config, tmp_path)
  rows = rows_of(tmp_path)
  assert [row['skipped'] for row in rows if 'skipped' in row] == [1, 3, 5]
  assert rows[-1]['step'] == 6 and steps_of(tmp_path) == []


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('eval_interval', [0, 5])
def test_the_last_update_is_tried_too(
    config, tmp_path, eval_interval, monkeypatch):
  config.update(max_iters=1, eval_interval=eval_interval)
  monkeypatch.setattr(Evaluator, 'columns', lambda *_: {'val_loss': math.nan})
  monkeypatch.setattr(Evaluator, 'loss', lambda *_: math.nan)
  with pytest.raises(metrics.Diverged, match='step 1: the loss after it is'):
    trainer.train(config, tmp_path)
  assert rows_of(tmp_path)[-1].get('val_loss', None) is None
  assert steps_of(tmp_path) == []


@pytest.mark.usefixtures('one_device')
def test_only_what_was_evaluated_ranks(config, tmp_path):
  config.update(max_iters=8, eval_interval=4, checkpoint_interval=2)
  trainer.train(config, tmp_path)
  with checkpoints.Checkpoints(tmp_path, read_only=True) as store:
    found = {step: store.meta(step)['val_loss'] for step in store.steps()}
  evaluated = {row['step']: row['val_loss'] for row in rows_of(tmp_path)
               if 'val_loss' in row}
  assert set(evaluated) == {4, 8}
  assert found == {6: None, 8: evaluated[8]}


@pytest.mark.usefixtures('one_device')
def test_accumulation_changes_nothing(config, spread, tmp_path):
  _, at_once = spread((1, 1, 1))
  config.update(max_iters=3, dropout=0.0, gradient_accumulation_steps=4)
  parts = losses(trainer.train(config, tmp_path / 'parts'))
  np.testing.assert_allclose(at_once, parts, rtol=1e-5)


@pytest.mark.usefixtures('one_device')
def test_packing_trains(config, tmp_path):
  folder = tmp_path / 'documents'
  folder.mkdir()
  for i in range(40):
    (folder / f'{i}.txt').write_text(f'document {i} ' * 8)
  config.update(dataset=str(folder), packing=True, max_iters=3)
  history = trainer.train(config, tmp_path / 'run')
  assert np.isfinite(losses(history)).all()


@pytest.mark.parametrize('mesh', [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_meshes_agree_with_one_device(spread, mesh):
  (_, alone), (_, together) = spread((1, 1, 1)), spread(mesh)
  np.testing.assert_allclose(alone, together, rtol=2e-5)


@pytest.mark.slow
def test_killed_and_restarted_is_never_killed(config, tmp_path):
  config.update(max_iters=40, eval_interval=10)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert runs.start_main(config, whole).wait() == 0
  killed = runs.start_main(config, parts)
  deadline = time.time() + 120
  while not (parts / 'checkpoints/10').exists() and time.time() < deadline:
    time.sleep(0.01)
  killed.kill()
  killed.wait()
  assert not (parts / 'checkpoints/40').exists(), 'killed too late'
  assert runs.start_main(config, parts).wait() == 0
  assert marks(whole, 40) == marks(parts, 40)


def test_runs_of_one_shape_share_a_program(config, one_device, tmp_path):
  """What a grid varies is an argument, no constant, of the step."""
  def program(**flags):
    own = config.copy_and_resolve_references()
    own.update(flags)
    opened = run_lib.open_run(own, tmp_path)
    return trainer.make_step(opened).lower(
        opened.template, opened.batch(0), opened.constants).as_text()
  first = program()
  assert first == program(learning_rate=0.5, min_lr=0.1, warmup_iters=7,
                          lr_schedule='wsd', max_iters=90, seed=3)
  assert first != program(weight_decay=0.5)
