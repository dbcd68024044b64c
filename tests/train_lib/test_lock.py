"""One process writes to a folder, whatever the file system can do."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from tests.train_lib import runs
from train_lib import lock as lock_lib
from train_lib.lock import Lock


@pytest.fixture(params=['flock', 'file'])
def locks(request, monkeypatch):
  """The file that names the holder, with and without locks of the system."""
  if request.param == 'flock':
    return 'lock'
  def unsupported(*args):
    raise OSError(errno.ENOLCK, 'No locks available')
  monkeypatch.setattr(lock_lib, '_flock', unsupported)
  monkeypatch.setattr(lock_lib, 'SETTLE', 0.0)
  return 'lock.held'


def test_the_second_is_told_who_is_the_first(locks, tmp_path):
  with Lock(tmp_path):
    with (pytest.raises(ValueError, match=f'by process {os.getpid()} on .*'
                        'use another --workdir') as error, Lock(tmp_path)):
      pass
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='in use'), Lock(tmp_path):
      pass
  with Lock(tmp_path):
    pass


def test_a_killed_one_holds_nothing(locks, tmp_path):
  code = (f'import os; os.environ["JAX_PLATFORMS"] = "cpu"\n'
          f'from train_lib import lock\n'
          f'def no(*args): raise OSError\n'
          f'if {locks!r} != "lock": lock._flock = no\n'
          f'lock.Lock({str(tmp_path)!r}).__enter__()\n'
          f'os.kill(os.getpid(), 9)')
  done = subprocess.run([sys.executable, '-c', code], cwd=runs.ROOT)
  assert done.returncode == -9 and (tmp_path / locks).read_text()
  with Lock(tmp_path) as lock:
    lock.check()
    assert json.loads((tmp_path / locks).read_text())['pid'] == os.getpid()


@pytest.mark.parametrize('locks', ['file'], indirect=True)
@pytest.mark.parametrize('content,held', [
    ({'pid': 1, 'host': 'elsewhere', 'since': 'today'}, 'process 1 on elsewh'),
    ({'pid': os.getpid()}, 'another process'), ([], 'another process'),
    (None, 'another process')])
def test_what_is_not_known_to_be_gone_is_there(
    locks, tmp_path, content, held):
  (tmp_path / locks).write_text('' if content is None else json.dumps(content))
  with (pytest.raises(ValueError, match=f'{held}.*delete .*{locks}'),
        Lock(tmp_path)):
    pass


@pytest.mark.parametrize('locks', ['file'], indirect=True)
def test_of_two_that_take_over_the_last_has_it(locks, tmp_path, monkeypatch):
  holder = {'pid': 2 ** 22 + 1, 'host': socket.gethostname(), 'since': 'today'}
  (tmp_path / locks).write_text(json.dumps(holder))
  faster = json.dumps({**holder, 'pid': 1})
  monkeypatch.setattr(
      lock_lib.time, 'sleep', lambda _: (tmp_path / locks).write_text(faster))
  with pytest.raises(ValueError, match='by process 1 on'), Lock(tmp_path):
    pass
  assert (tmp_path / locks).read_text() == faster


@pytest.mark.parametrize('fate', ['deleted', 'replaced'])
def test_the_folder_is_missed(tmp_path, fate):
  folder = tmp_path / 'run'
  folder.mkdir()
  with Lock(folder) as lock:
    lock.check()
    folder.rename(tmp_path / 'elsewhere')
    if fate == 'replaced':
      folder.mkdir()
      (folder / 'lock').write_text('')
    with pytest.raises(OSError, match='deleted or replaced'):
      lock.check()


def test_a_name_that_is_not_written_yet(tmp_path):
  """Between taking the lock and writing who did, another one asks."""
  with Lock(tmp_path):
    file = tmp_path / 'lock'
    name = file.read_bytes()
    file.write_bytes(b'')
    later = threading.Timer(0.1, file.write_bytes, [name])
    later.start()
    with pytest.raises(
        lock_lib.Taken, match=f'in use by process {os.getpid()}'):
      Lock(tmp_path).__enter__()
    later.join()
