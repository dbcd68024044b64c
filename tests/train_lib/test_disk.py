"""Files are written whole, and errors of the system are told from others."""

import errno
import os

import pytest

from train_lib import disk


def test_json_is_written_whole(tmp_path):
  path = tmp_path / 'config.json'
  disk.write_json(path, {'a': 1})
  disk.write_json(path, {'a': 2})
  assert path.read_text() == '{\n  "a": 2\n}\n'
  assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_through_a_link(tmp_path):
  other = tmp_path / 'other'
  other.write_text('mine')
  path = tmp_path / 'config.json'
  for name in ('config.json', 'config.json.tmp'):
    (tmp_path / name).symlink_to(other)
  disk.write_json(path, {})
  assert other.read_text() == 'mine' and not path.is_symlink()


def test_everything_below_a_folder_is_synced(tmp_path, monkeypatch):
  (tmp_path / 'a/b').mkdir(parents=True)
  (tmp_path / 'a/b/file').write_text('')
  synced = []
  monkeypatch.setattr(disk, 'sync', lambda path: synced.append(str(path)))
  disk.sync_tree(tmp_path)
  names = [os.path.relpath(path, tmp_path) for path in synced]
  assert names == ['a/b/file', 'a/b', 'a', '.']


def _nested():
  try:
    try:
      raise OSError(errno.EIO, 'Input/output error')
    except OSError:
      raise RuntimeError('from a library') from None
  except RuntimeError as error:
    return error


@pytest.mark.parametrize('error,number', [
    (OSError(errno.ENOSPC, 'full'), errno.ENOSPC), (_nested(), errno.EIO),
    (ValueError("UNKNOWN: [os_error_code='28']"), errno.ENOSPC),
    (ValueError('a damaged file'), None)])
def test_the_system_behind_an_error(error, number):
  found = disk.system_error(error)
  assert (found and found.errno) == number


def test_the_newest_files_are_kept(tmp_path):
  for age, name in enumerate('cba'):
    (tmp_path / name).write_bytes(b'x' * 10)
    os.utime(tmp_path / name, (1000 - age, 1000 - age))
  disk.keep_newest(tmp_path, 30)
  assert len(list(tmp_path.iterdir())) == 3
  disk.keep_newest(tmp_path, 25)
  assert {path.name for path in tmp_path.iterdir()} == {'b', 'c'}
  disk.keep_newest(tmp_path, 0)
  assert not list(tmp_path.iterdir())
