"""One process writes to a run's folder: the lock on it."""

import contextlib
import json
import os
import pathlib
import socket
import time

import jax

from train_lib import disk

# Seconds in which two processes that take over the same stale file have both
# written their names.
SETTLE = 0.5
NAMED = 1.0  # Seconds that a name is waited for.


class Taken(ValueError):
  """Another process holds a lock; the message names that one."""


class Lock:
  """While entered, the folder is this process's alone.

  The system's lock on the file `lock`, which ends with the process however
  that ends. On a file system without locks it is the file `lock.held`, which
  a kill leaves behind: it is taken over when its process is gone, which is
  known on the same host only. Of several processes of one run the first
  holds it for all.

  Args:
    workdir: the run's folder, which exists.
    name: of the file; a folder may have several locks.

  Raises:
    Taken: another process holds it.
  """

  def __init__(self, workdir, name='lock'):
    self.workdir = pathlib.Path(workdir)
    self._path, self._held = (
        self.workdir / name, self.workdir / f'{name}.held')
    self._name = json.dumps({
        'pid': os.getpid(), 'host': socket.gethostname(),
        'since': time.strftime('%Y-%m-%d %H:%M:%S'),
        'number': time.monotonic_ns()})
    self._descriptor = None

  def check(self):
    """Raises OSError if the folder is no longer the one that was locked."""
    if self._descriptor is None:
      return
    ours = os.fstat(self._descriptor)
    with contextlib.suppress(*disk.ABSENT):
      now = os.stat(self._path)
      if (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino):
        return
    raise FileNotFoundError(
        f'--workdir={self.workdir} was deleted or replaced while the run wrote '
        'to it: what it wrote since is lost')

  def __enter__(self):
    if jax.process_index():
      return self
    self._descriptor = os.open(
        self._path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0),
        0o644)
    try:
      self._take()
    except BaseException:
      self._close()
      raise
    return self

  def _take(self):
    try:
      _flock(self._descriptor)
    except BlockingIOError:
      raise self._taken(self._path) from None
    except OSError:
      self._take_file()
      return
    os.truncate(self._descriptor, 0)
    os.write(self._descriptor, self._name.encode())

  def _take_file(self):
    try:
      with open(self._held, 'x') as file:
        file.write(self._name)
    except FileExistsError:
      if not _gone(_read(self._held)):
        raise self._taken(self._held) from None
      mine = self._path.with_name(f'{self._path.name}.{os.getpid()}')
      mine.write_text(self._name)
      mine.replace(self._held)
      time.sleep(SETTLE)  # Whoever came last has it.
      if self._held.read_text() != self._name:
        raise self._taken(self._held) from None

  def _taken(self, path):
    until = time.monotonic() + NAMED
    # Who has just taken it may not have written its name yet.
    while not (holder := _read(path)) and time.monotonic() < until:
      time.sleep(0.01)
    who = 'another process'
    if holder:
      who = (f'process {holder["pid"]} on {holder["host"]} since '
             f'{holder["since"]}')
    way = '' if path == self._path else f', delete {path} if it is gone'
    return Taken(
        f'--workdir={self.workdir} is in use by {who}: wait for it{way}, or '
        'use another --workdir')

  def _close(self):
    os.close(self._descriptor)
    self._descriptor = None

  def __exit__(self, *error):
    if self._descriptor is None:
      return
    with contextlib.suppress(OSError):
      if self._held.read_text() == self._name:
        self._held.unlink()
    self._close()


def _flock(descriptor):
  """Takes the system's lock on a file; OSError where there are none."""
  try:
    import fcntl
  except ImportError as error:  # Windows.
    raise OSError(str(error)) from None
  fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _read(path):
  """Who wrote a lock file, or None: it is just being written."""
  try:
    holder = json.loads(path.read_text())
    return holder if {'pid', 'host', 'since'} <= set(holder) else None
  except (OSError, ValueError, TypeError):
    return None


def _gone(holder):
  """Whether the process of a lock file is known to have ended."""
  if holder is None or holder['host'] != socket.gethostname():
    return False
  try:
    os.kill(holder['pid'], 0)
  except OSError as error:
    return isinstance(error, ProcessLookupError)
  return False
