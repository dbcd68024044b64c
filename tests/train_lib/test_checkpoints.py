"""Checkpoints: complete, verified, and read on any mesh."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train_lib.runs import losses, marks
from train_lib import checkpoints, trainer
from train_lib import run as run_lib
from train_lib.state import TrainState


def test_the_latest_two_and_the_best_are_kept(tmp_path):
  zero = jnp.int32(0)
  state = TrainState(zero, {'w': jnp.ones(3)}, {'m': jnp.ones(3)}, zero)
  with checkpoints.Checkpoints(tmp_path) as store:
    for step, val_loss in ((1, 1.0), (2, 2.0), (3, 2.5), (4, 2.2)):
      store.save(step, state, meta={}, val_loss=val_loss)
    store.wait()
    assert store.steps() == [1, 3, 4]


@pytest.mark.usefixtures('one_device')
def test_damaged_ones_are_passed_over(config, workdir, caplog):
  whole = marks(workdir, 30)
  damaged = workdir / 'checkpoints/30/params/ocdbt.process_0/d'
  largest = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  trainer.train(config, workdir)
  assert 'checkpoint 30 is damaged' in caplog.text
  assert marks(workdir, 30) == whole
  assert len(list((workdir / 'damaged').iterdir())) == 1


def test_fingerprint_sees_any_element():
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  mark = lambda x: int(checkpoints.fingerprint({'x': x})['x'])
  swapped = x.copy()
  swapped[0, 1], swapped[2, 2] = x[2, 2], x[0, 1]
  nearly = x.copy()
  nearly[1, 1] = np.nextafter(nearly[1, 1], 9)
  assert len({mark(x), mark(swapped), mark(nearly), mark(-x)}) == 4
  assert mark(x) == mark(x.copy())


def test_resumes_on_another_mesh(config, spread, tmp_path):
  before, _ = spread((2, 2, 2))
  workdir = shutil.copytree(before, tmp_path / 'run')
  config.update(max_iters=6, dropout=0.0, mesh_data=8)
  run = run_lib.open_run(config, workdir)
  with checkpoints.Checkpoints(workdir, read_only=True) as store:
    state, step, _ = run_lib.restore(run, store)
  assert step == 3 and marks(before, 3) == {
      name: checkpoints.marks(arrays)
      for name, arrays in checkpoints.flatten(state).items()}
  assert len(losses(trainer.train(config, workdir))) == 3


def test_json_is_written_whole(tmp_path):
  path = tmp_path / 'config.json'
  checkpoints.write_json(path, {'a': 1})
  checkpoints.write_json(path, {'a': 2})
  assert path.read_text() == '{\n  "a": 2\n}\n'
  assert list(tmp_path.iterdir()) == [path]
