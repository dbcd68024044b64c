"""The loop: it learns, resumes bit for bit, and stops where it should."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from train_lib import checkpoints, inference, metrics, session, trainer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Most tests want a single device; those of the mesh ask for eight."""
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


def losses(history):
  return [row['loss'] for row in history if 'loss' in row]


def marks(workdir, step):
  """The fingerprint of a checkpoint."""
  with checkpoints.Checkpoints(workdir, read_only=True) as store:
    return store.meta(step)['fingerprint']


def test_learns_and_leaves_a_run_folder(config, tmp_path):
  config.update(max_iters=60, eval_interval=30, learning_rate=1e-2,
                log_interval=20, eval_final=True)
  history = trainer.train(config, tmp_path / 'run')
  assert losses(history)[-1] < losses(history)[0] - 1
  assert history[-1]['val_loss_full'] == pytest.approx(
      history[-2]['val_loss'], rel=0.1)
  rows = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  assert [json.loads(row) for row in rows] == history
  saved = json.loads((tmp_path / 'run/config.json').read_text())
  assert saved['vocab_size'] == 256 and 'workdir' not in saved


def test_resumes_bit_for_bit(config, tmp_path, monkeypatch):
  whole = trainer.train(config, tmp_path / 'whole')
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
  assert losses(first) + losses(second) == losses(whole)
  assert len(losses(first)) == 4
  assert marks(tmp_path / 'parts', 6) == marks(tmp_path / 'whole', 6)


def test_damaged_checkpoints_are_passed_over(config, tmp_path, caplog):
  trainer.train(config, tmp_path / 'run')
  whole = marks(tmp_path / 'run', 6)
  damaged = tmp_path / 'run/checkpoints/6/params/ocdbt.process_0/d'
  largest = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  trainer.train(config, tmp_path / 'run')
  assert 'checkpoint 6 is damaged' in caplog.text
  assert marks(tmp_path / 'run', 6) == whole
  assert len(list((tmp_path / 'run/damaged').iterdir())) == 1


def test_fingerprint_sees_any_element():
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  mark = lambda x: int(checkpoints.fingerprint({'x': x})['x'])
  swapped = x.copy()
  swapped[0, 1], swapped[2, 2] = x[2, 2], x[0, 1]
  nearly = x.copy()
  nearly[1, 1] = np.nextafter(nearly[1, 1], 9)
  assert len({mark(x), mark(swapped), mark(nearly), mark(-x)}) == 4
  assert mark(x) == mark(x.copy())


def test_another_model_is_refused(config, tmp_path):
  config.max_iters = 1
  trainer.train(config, tmp_path / 'run')
  config.n_embd = 32
  with pytest.raises(ValueError, match='n_embd is 32.*n_embd=16'):
    trainer.train(config, tmp_path / 'run')
  config.n_embd, config.tokenizer = 16, 'char'
  with pytest.raises(ValueError, match='tokenizer|vocab_size'):
    trainer.train(config, tmp_path / 'run')


def test_flags_of_the_loop_may_change(config, tmp_path):
  config.max_iters = 2
  trainer.train(config, tmp_path / 'run')
  config.update(max_iters=3, learning_rate=1e-4, remat='full', batch_size=4)
  assert len(losses(trainer.train(config, tmp_path / 'run'))) == 1


def test_not_finite_stops_or_skips(config, tmp_path):
  config.update(learning_rate=1e30, warmup_iters=0, grad_clip=0.0)
  with pytest.raises(metrics.Diverged, match='step .*--learning_rate'):
    trainer.train(config, tmp_path / 'stop')
  kept = tmp_path / 'stop/checkpoints'
  assert not any(path.name.isdigit() for path in kept.iterdir())
  config.nan_policy = 'skip'
  history = trainer.train(config, tmp_path / 'skip')
  assert history[-1]['step'] == 6


def test_accumulation_changes_nothing(config, tmp_path):
  config.update(dropout=0.0, max_iters=3)
  one = trainer.train(config, tmp_path / 'one')
  config.gradient_accumulation_steps = 4
  four = trainer.train(config, tmp_path / 'four')
  np.testing.assert_allclose(losses(one), losses(four), rtol=1e-5)


def test_packing_trains(config, tmp_path):
  folder = tmp_path / 'documents'
  folder.mkdir()
  for i in range(40):
    (folder / f'{i}.txt').write_text(f'document {i} ' * 8)
  config.update(dataset=str(folder), packing=True)
  history = trainer.train(config, tmp_path / 'run')
  assert np.isfinite(losses(history)).all()


def test_eval_and_sample_read_a_run(config, tmp_path, capsys):
  config.update(max_iters=4, eval_interval=4, eval_final=True)
  history = trainer.train(config, tmp_path / 'run')
  result = inference.evaluate_run(config, tmp_path / 'run')
  assert result['val_loss_full'] == pytest.approx(
      history[-1]['val_loss_full'], abs=1e-6)
  config.update(prompt='12 squared', max_new_tokens=20)
  one = inference.sample_run(config, tmp_path / 'run')
  assert one[0].startswith('12 squared')
  assert one[0] in capsys.readouterr().out
  config.num_samples = 2
  assert len(inference.sample_run(config, tmp_path / 'run')) == 2
  with pytest.raises(ValueError, match='no checkpoints'):
    inference.sample_run(config, tmp_path / 'nowhere')


BAD = [
    ('gradient_accumulation_steps', 3, 'batch_size .8. must be a multiple'),
    ('mesh_tensor', 3, 'does not fit the 1 devices'),
    ('nan_policy', 'hope', 'unknown nan_policy'),
    ('optimizer', 'adam', "did you mean 'adamw'"),
    ('lr_schedule', 'cosin', "did you mean 'cosine'"),
    ('mlp_variant', 'glu', "did you mean 'gelu'|'swiglu'"),
    ('norm_variant', 'rms', 'known: rmsnorm, layernorm'),
    ('attention_variant', 'casual', "did you mean 'causal'"),
    ('block_size', 10**6, 'block_size'),
    ('n_head', 3, r'n_head \(3\) must divide n_embd \(16\)'),
    ('n_kv_group', 3, r'n_kv_group \(3\) must divide n_head \(2\): use 1 or 2'),
    ('dataset', '/nowhere/at/all', 'dataset'),
    ('vocab_size', 10, 'vocab_size'),
    ('eval_iters', 0, 'eval_iters'),
    ('remat', 'some', 'unknown remat'),
    ('compute_dtype', 'float16', 'unknown compute_dtype'),
    ('profile_steps', ('1',), 'profile_steps'),
]


@pytest.mark.parametrize('flag,value,message', BAD, ids=[b[0] for b in BAD])
def test_bad_flags_get_one_line(config, tmp_path, flag, value, message):
  config[flag] = value
  with pytest.raises(ValueError, match=message) as error:
    trainer.train(config, tmp_path / 'run')
  assert '\n' not in str(error.value)


def test_workdir_that_cannot_be_written(config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='--workdir='):
    session.open_session(config, tmp_path / 'file/run')


def test_profile(config, tmp_path):
  config.update(profile_steps=('1', '2'), max_iters=3)
  trainer.train(config, tmp_path / 'run')
  assert list((tmp_path / 'run').rglob('*.xplane.pb'))


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_meshes_agree_with_one_device(config, tmp_path, monkeypatch, mesh):
  config.update(max_iters=3, dropout=0.0)
  alone = trainer.train(config, tmp_path / 'one')
  monkeypatch.undo()
  config.update(mesh_data=mesh[0], mesh_fsdp=mesh[1], mesh_tensor=mesh[2])
  spread = trainer.train(config, tmp_path / 'eight')
  np.testing.assert_allclose(losses(alone), losses(spread), rtol=2e-5)


def test_resumes_on_another_mesh(config, tmp_path, monkeypatch):
  config.update(max_iters=3, dropout=0.0)
  monkeypatch.undo()
  config.update(mesh_data=2, mesh_fsdp=2, mesh_tensor=2)
  trainer.train(config, tmp_path / 'run')
  before = marks(tmp_path / 'run', 3)
  config.update(mesh_data=8, mesh_fsdp=1, mesh_tensor=1)
  run = session.open_session(config, tmp_path / 'run')
  with checkpoints.Checkpoints(tmp_path / 'run') as store:
    state, step = session.restore(run, store)
    items = checkpoints.flatten(state)
    assert step == 3 and before == {
        name: checkpoints.marks(arrays) for name, arrays in items.items()}
  config.max_iters = 6
  assert len(losses(trainer.train(config, tmp_path / 'run'))) == 3


def command(config, workdir, **flags):
  """A process of main.py with the config of a test."""
  path = pathlib.Path(workdir).with_suffix('.json')
  values = {**config.to_dict(), **flags}
  path.write_text(json.dumps(values))
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  return subprocess.Popen(
      [sys.executable, 'main.py', f'--config={path}', f'--workdir={workdir}'],
      cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_killed_and_restarted_is_never_killed(config, tmp_path):
  flags = dict(max_iters=40, eval_interval=10)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert command(config, whole, **flags).wait() == 0
  killed = command(config, parts, **flags)
  deadline = time.time() + 120
  while not (parts / 'checkpoints/10').exists() and time.time() < deadline:
    time.sleep(0.01)
  killed.kill()
  killed.wait()
  assert not (parts / 'checkpoints/40').exists(), 'killed too late'
  assert command(config, parts, **flags).wait() == 0
  assert marks(whole, 40) == marks(parts, 40)
