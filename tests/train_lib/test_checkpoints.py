"""Checkpoints: complete, verified, and read on any mesh."""

import dataclasses
import errno
import math
import os
import random
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import pytest

from tests.train_lib.runs import losses, marks
from train_lib import checkpoints, disk, fingerprint, trainer
from train_lib import run as run_lib
from train_lib.state import TrainState


def state_of(step, size=3):
  """A state that tells its step."""
  return TrainState(
      jnp.int32(step), {'w': jnp.full(size, step, jnp.float32)},
      {'m': jnp.full(3, -step, jnp.float32)}, jnp.int32(0))


def wanted(state):
  """What restores a state like this one."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      checkpoints.flatten(state))


WANTED = wanted(state_of(0))


def save(workdir, *steps, size=3, **options):
  with checkpoints.Checkpoints(workdir) as store:
    for step in steps:
      store.save(step, state_of(step, size), meta={}, **options)


def restored(workdir, items=WANTED, *, read_only=False, **options):
  """The step restored; its arrays must be those of this step."""
  with checkpoints.Checkpoints(workdir, read_only=read_only) as store:
    found = store.restore(items, **options)
  if found is None:
    return None
  step, items, _ = found
  assert items['rest']['step'] == step and (items['params']['w'] == step).all()
  return step


def tree(folder):
  """{path: content} of everything below a folder."""
  return {path.relative_to(folder): path.read_bytes() if path.is_file()
          else None for path in folder.rglob('*') if path.name != 'lock'}


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A workdir with checkpoints 1 and 2, to be copied."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  save(workdir, 1, 2)
  return workdir


@pytest.fixture
def run(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'run')


def test_the_latest_two_and_the_best_are_kept(tmp_path):
  with checkpoints.Checkpoints(tmp_path) as store:
    for step, val_loss in ((1, 1.0), (2, 2.0), (3, 2.5), (4, 2.2)):
      store.save(step, state_of(step), meta={}, val_loss=val_loss)
    store.wait()
    assert store.steps() == [1, 3, 4]
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1', '3', '4']


@pytest.mark.parametrize('unranked', [None, math.nan, math.inf, -math.inf])
def test_only_a_finite_loss_of_its_own_ranks(tmp_path, unranked):
  with checkpoints.Checkpoints(tmp_path) as store:
    for step, val_loss in ((1, unranked), (2, 2.0), (3, 3.0)):
      store.save(step, state_of(step), meta={}, val_loss=val_loss)
  with checkpoints.Checkpoints(tmp_path) as store:  # Remembered.
    assert store.best() == 2
    for step in (4, 5, 6):
      store.save(step, state_of(step), meta={}, val_loss=unranked)
    store.wait()
    assert store.steps() == [2, 5, 6]
  assert restored(tmp_path, best=True) == 2 and restored(tmp_path) == 6


UNREAD = 'commit_success.txt'  # Orbax leaves it behind, and never looks.

FAULTS = {
    'missing': lambda path, content: path.unlink(),
    'empty': lambda path, content: path.write_bytes(b''),
    'half': lambda path, content: path.write_bytes(
        content[:len(content) // 2]),
    'random': lambda path, content: path.write_bytes(
        random.Random(0).randbytes(len(content))),
    'flipped': lambda path, content: path.write_bytes(
        bytes([*content[:len(content) // 2],
               content[len(content) // 2] ^ 1,
               *content[len(content) // 2 + 1:]])),
    'folder': lambda path, content: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_any_file_may_be_damaged(two, tmp_path, fault):
  """What is restored is right, and is the older one where it must be."""
  steps = set()
  files = [path.relative_to(two) for path in (two / 'checkpoints/2').rglob('*')
           if path.is_file() and path.stat().st_size]
  for number, name in enumerate(files):
    workdir = shutil.copytree(two, tmp_path / str(number))
    FAULTS[fault](workdir / name, (workdir / name).read_bytes())
    step = restored(workdir)
    steps.add(step)
    assert (workdir / 'damaged').exists() == (step == 1)
  assert 1 in steps
  save(workdir, 2, 3)
  assert restored(workdir) == 3


@pytest.mark.parametrize('name', ['', 'meta', 'params', 'rest'])
@pytest.mark.parametrize('fault', ['missing', 'empty'])
def test_any_folder_may_be_damaged(run, name, fault):
  folder = run / 'checkpoints/2' / name
  shutil.rmtree(folder)
  if fault == 'empty':
    folder.mkdir()
  assert restored(run) == 1


@pytest.mark.parametrize('fault', FAULTS)
def test_nothing_is_moved_unless_an_older_one_is_restored(run, fault):
  for step in (1, 2):
    path = run / f'checkpoints/{step}/meta/metadata'
    FAULTS[fault](path, path.read_bytes())
  before = tree(run)
  for _ in range(2):
    with pytest.raises(ValueError, match='nothing was moved') as error:
      restored(run)
    assert '\n' not in str(error.value)
  assert tree(run) == before


def test_none_is_left_beside_damaged_ones(run):
  (run / 'damaged').mkdir()
  for step in (1, 2):
    (run / f'checkpoints/{step}').rename(run / f'damaged/{step}-0')
  with pytest.raises(ValueError, match='is empty, but .*damaged'):
    restored(run)


@pytest.mark.parametrize('name', ['3', '999', '0002', '-3', '٣', 'notes'])
@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_a_stray_name_is_passed_over(run, name, kind):
  path = run / 'checkpoints' / name
  path.mkdir() if kind == 'folder' else path.write_text('')
  assert restored(run) == 2
  save(run, 3)
  assert restored(run) == 3


def test_a_renamed_checkpoint_is_passed_over(run):
  (run / 'checkpoints/2').rename(run / 'checkpoints/7')
  assert restored(run) == 1


@pytest.mark.parametrize('change,message', [
    ({'params': {'w': jnp.zeros(4)}}, r'w is float32\[4\], .* is float32\[3\]'),
    ({'opt_state': {'m': jnp.zeros(3, int)}}, r'm is int32\[3\], .* float32'),
    ({'opt_state': {}}, 'm is missing, .* is float32'),
    ({'opt_state': {'m': jnp.zeros(3), 'v': jnp.zeros(3)}}, 'v .* is missing'),
], ids=['shape', 'dtype', 'fewer', 'more'])
def test_another_state_is_refused_before_it_is_read(
    run, change, message, monkeypatch):
  before = tree(run)
  monkeypatch.setattr(checkpoints.Checkpoints, '_read_arrays', None)
  other = dataclasses.replace(state_of(0), **change)
  with pytest.raises(ValueError, match=message) as error:
    restored(run, wanted(other))
  assert '\n' not in str(error.value) and tree(run) == before


READS = ['meta/metadata', 'params/_METADATA', 'params/d', 'rest/_METADATA']


@pytest.mark.skipif(not os.path.exists('/proc/self/mem'), reason='needs /proc')
@pytest.mark.parametrize('name', READS)
def test_what_cannot_be_read_stops_the_start(run, name):
  path = run / 'checkpoints/2' / name
  path = max(path.iterdir()) if path.is_dir() else path
  path.unlink()
  path.symlink_to('/proc/self/mem')  # Reading it is an I/O error.
  with pytest.raises(OSError, match='Input/output error'):
    restored(run)
  assert not (run / 'damaged').exists()


@pytest.mark.parametrize('error', [
    OSError(errno.EIO, 'Input/output error'), MemoryError(),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED'), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__)
def test_a_failure_to_read_is_no_damage(run, error, monkeypatch):
  with checkpoints.Checkpoints(run) as store:
    def fail(*args, **kwargs):
      raise error
    monkeypatch.setattr(store._orbax, 'restore', fail)
    with pytest.raises(type(error)):
      store.restore(WANTED)
  assert not (run / 'damaged').exists()


def test_readers_leave_everything_as_it_is(run):
  (run / 'checkpoints/2/meta/metadata').write_text('')
  (run / f'checkpoints/3{checkpoints.UNFINISHED}').mkdir()
  before = tree(run)
  assert restored(run, read_only=True) == 1 and tree(run) == before


def test_what_a_kill_leaves_is_removed(run):
  (run / f'checkpoints/3{checkpoints.UNFINISHED}/params').mkdir(parents=True)
  assert restored(run) == 2
  assert sorted(os.listdir(run / 'checkpoints')) == ['1', '2']


def test_all_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
  """A power cut empties what was not synced, but leaves names."""
  synced = set()
  monkeypatch.setattr(disk, 'sync', lambda path: synced.add(str(path)))
  save(tmp_path, 5)
  folder = tmp_path / 'checkpoints/5'
  unfinished = f'{folder}{checkpoints.UNFINISHED}'
  written = {str(path).replace(str(folder), unfinished)
             for path in folder.rglob('*') if path != folder / UNREAD}
  assert synced == {unfinished, str(folder.parent)} | written


def test_withdrawn_ones_are_not_restored(tmp_path):
  with checkpoints.Checkpoints(tmp_path) as store:
    for step in (1, 2, 3):
      store.save(step, state_of(step), meta={}, val_loss=4.0 - step)
    assert store.withdraw(3) == 2 and store.best() == 2
    assert store.withdraw(3) == 2
  assert restored(tmp_path) == 2
  assert os.listdir(tmp_path / 'diverged') == ['3-0']
  with checkpoints.Checkpoints(tmp_path) as store:
    assert store.withdraw(1) is None
  assert restored(tmp_path) is None, 'a run that diverged at once may begin'


def test_a_failed_save_is_one_line_and_loses_nothing(tmp_path):
  save(tmp_path, 1, 2)
  large = dataclasses.replace(
      state_of(3), params={'w': jax.random.normal(jax.random.key(0), 1 << 16)})
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with (pytest.raises(OSError, match='checkpoint 3 .*good one is 2') as error,
        checkpoints.Checkpoints(tmp_path) as store):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
      store.save(3, large, meta={})
      store.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(error.value)
  assert restored(tmp_path) == 2


def test_a_failed_save_is_noticed_before_the_next(tmp_path, monkeypatch):
  def full(folder):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(disk, 'sync_tree', full)
  with (pytest.raises(OSError, match='there is none before'),
        checkpoints.Checkpoints(tmp_path) as store):
    store.save(1, state_of(1), meta={})
    deadline = time.time() + 60
    while time.time() < deadline:
      store.check()
  assert os.listdir(tmp_path / 'checkpoints') == []


def test_an_old_one_that_somebody_deleted_is_not_missed(run):
  with checkpoints.Checkpoints(run) as store:
    shutil.rmtree(run / 'checkpoints/1')
    store.save(3, state_of(3), meta={}, val_loss=1.0)
    store.save(4, state_of(4), meta={}, val_loss=2.0)
    store.wait()
    assert store.steps() == [3, 4]


@pytest.mark.usefixtures('one_device')
def test_a_damaged_one_is_trained_again(config, workdir, capsys):
  whole = marks(workdir, 30)
  damaged = workdir / 'checkpoints/30/params/ocdbt.process_0/d'
  largest = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
  FAULTS['flipped'](largest, largest.read_bytes())
  trainer.train(config, workdir)
  assert 'checkpoint 30 is damaged' in capsys.readouterr().err
  assert marks(workdir, 30) == whole
  assert len(list((workdir / 'damaged').iterdir())) == 1


def test_resumes_on_another_mesh(config, spread, tmp_path):
  before, _ = spread((2, 2, 2))
  workdir = shutil.copytree(before, tmp_path / 'run')
  config.update(max_iters=6, dropout=0.0, mesh_data=8)
  run = run_lib.open_run(config, workdir)
  with checkpoints.Checkpoints(workdir, read_only=True) as store:
    state, step, _ = run_lib.restore(run, store)
  assert step == 3 and marks(before, 3) == {
      name: fingerprint.marks(arrays)
      for name, arrays in checkpoints.flatten(state).items()}
  assert len(losses(trainer.train(config, workdir))) == 3
