"""Files that are whole and stay: written, synced, then given their name."""

import contextlib
import json
import os
import pathlib
import re

# That a file is not there, or is no file: found wrong, where other errors of
# the system mean that it could not be read at all.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def sync(path):
  """Has the disk keep a file's content, or a folder's names."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_tree(folder):
  """Syncs all files and folders below a folder, and the folder itself."""
  for parent, _, files in os.walk(folder, topdown=False):
    for name in files:
      sync(os.path.join(parent, name))
    sync(parent)


def write_whole(path, content):
  """Writes bytes that are there whole or not at all, even after a power cut."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.unlink(missing_ok=True)
  with open(temporary, 'xb') as file:  # A new file: never through a link.
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
  sync(path.parent)


def write_json(path, value):
  """Writes JSON whole or not at all."""
  write_whole(path, (json.dumps(value, indent=2) + '\n').encode())


def read_all(folder):
  """Reads every file below a folder; OSError if the system cannot."""
  for path in pathlib.Path(folder).rglob('*'):
    if not path.is_dir():
      with open(path, 'rb') as file:
        while file.read(1 << 24):
          pass


def keep_newest(folder, most):
  """Deletes the oldest files of a folder until `most` bytes are left.

  Other processes may do the same: a file that is gone is no error.
  """
  found = []
  for path in pathlib.Path(folder).iterdir():
    with contextlib.suppress(*ABSENT):
      stat = path.stat()
      found.append((stat.st_mtime_ns, stat.st_size, path))
  kept = 0
  for _, size, path in sorted(found, reverse=True):
    kept += size
    if kept > most:
      path.unlink(missing_ok=True)


def system_error(error):
  """The OSError behind an exception of any library, or None."""
  while error is not None:
    if isinstance(error, OSError):
      return error
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's.
    if code:
      number = int(code.group(1))
      return OSError(number, os.strerror(number))
    error = error.__cause__ or error.__context__
  return None
