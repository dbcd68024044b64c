"""The loop: it learns, resumes bit for bit, and stops where it should."""

import os
import signal
import time

import numpy as np
import pytest

from tests.train_lib import runs
from tests.train_lib.runs import losses, marks
from train_lib import metrics, trainer


def test_learns(trained):
  history = trained.history
  assert losses(history)[-1] < losses(history)[0] - 1
  assert history[-1]['val_loss_full'] == pytest.approx(
      history[-2]['val_loss'], rel=0.1)


@pytest.mark.usefixtures('one_device')
def test_resumes_bit_for_bit(config, trained, tmp_path, monkeypatch):
  # SIGTERM in the middle of step 4: the step is finished, saved, left.
  add = metrics.Meter.add

  def add_and_terminate(meter, values):
    add(meter, values)
    if meter.step == 4:
      os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(metrics.Meter, 'add', add_and_terminate)
  first = trainer.train(config, tmp_path / 'parts')
  monkeypatch.setattr(metrics.Meter, 'add', add)
  second = trainer.train(config, tmp_path / 'parts')
  assert losses(first) + losses(second) == losses(trained.history)
  assert len(losses(first)) == 4
  assert marks(tmp_path / 'parts', 30) == marks(trained.workdir, 30)


@pytest.mark.usefixtures('one_device')
def test_flags_of_the_loop_may_change(config, workdir):
  config.update(max_iters=31, learning_rate=1e-4, remat='full', batch_size=4)
  assert len(losses(trainer.train(config, workdir))) == 1


@pytest.mark.usefixtures('one_device')
def test_not_finite_stops_or_skips(config, tmp_path):
  config.update(max_iters=6, learning_rate=1e30, warmup_iters=0, grad_clip=0.0)
  with pytest.raises(metrics.Diverged, match='step .*--learning_rate'):
    trainer.train(config, tmp_path / 'stop')
  kept = tmp_path / 'stop/checkpoints'
  assert not any(path.name.isdigit() for path in kept.iterdir())
  config.nan_policy = 'skip'
  history = trainer.train(config, tmp_path / 'skip')
  assert history[-1]['step'] == 6


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
