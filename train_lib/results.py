"""What the folders of runs say: their configs, records, metrics and ends."""

import dataclasses
import functools
import json
import math
import os
import pathlib

from train_lib import record

ERROR = 'error.txt'
SWEEP = 'sweep.json'

# The columns by which runs are compared: the first that a run has.
SCORES = ('val_accuracy_full', 'val_accuracy', 'val_loss_full', 'val_loss')


@dataclasses.dataclass(frozen=True)
class Result:
  """A run as its folder tells it.

  Attributes:
    name: of the folder, from where the search for runs began.
    folder: its path.
    config: {flag: value} as JSON.
    record: that of record.read.
    rows: of metrics.jsonl, oldest first.
    error: why it failed, a line; or None.
  """
  name: str
  folder: pathlib.Path
  config: dict
  record: dict
  rows: list
  error: str | None

  @property
  def finished(self):
    """Whether it has ended as its config says."""
    ended, goal = self.record.get('finished'), self.record.get('stopped_when')
    return ended is not None and (
        ended == self.config.get('max_iters')
        or goal is not None and goal == self.config.get('stop_when'))

  @property
  def state(self):
    """'finished', 'failed', 'unfinished' or 'not begun', for people."""
    if self.finished:
      return 'finished'
    if self.error:
      return 'failed'
    return 'unfinished' if self.config else 'not begun'

  @property
  def step(self):
    """The last step of which there is a row."""
    return self.rows[-1]['step'] if self.rows else 0

  @property
  def seconds(self):
    """Seconds of training, over all parts of the run."""
    return self.rows[-1].get('elapsed_s') or 0.0 if self.rows else 0.0

  @functools.cached_property
  def last(self):
    """{column: its last value that is a number}."""
    return {name: value for row in self.rows for name, value in row.items()
            if isinstance(value, (int, float)) and math.isfinite(value)}

  @property
  def metric(self):
    """The column that it is compared by, or None."""
    return next((name for name in SCORES if name in self.last), None)

  @property
  def score(self):
    """The last value of that column, or None."""
    return self.last.get(self.metric)

  def state_bytes(self):
    """Bytes that decoding a sequence of block_size tokens keeps, or None."""
    per_token = self.record.get('state_bytes_per_token')
    if per_token is None:
      return None
    return self.record['state_bytes'] + per_token * self.config['block_size']


def failed_at(folder):
  """What tells one failure of a run from the next, or None."""
  try:
    return (pathlib.Path(folder) / ERROR).stat().st_mtime_ns
  except OSError:
    return None


def higher_is_better(metric):
  """Of a column: accuracies are to rise, losses to fall."""
  return 'accuracy' in metric


def better(metric, score, than):
  """Whether a score beats another one, or there is none yet."""
  return than is None or (
      score > than if higher_is_better(metric) else score < than)


def read(folder, root=None):
  """The Result of a run's folder; None where no run has begun.

  Args:
    folder: its path.
    root: where names begin; none: the folder above.
  """
  folder = pathlib.Path(folder)
  config, error = _json(folder / 'config.json'), _error(folder)
  if config is None and error is None:
    return None
  name = folder.relative_to(root or folder.parent).as_posix()
  return Result(name if name != '.' else folder.name, folder, config or {},
                record.read(folder), _rows(folder / 'metrics.jsonl'), error)


def find(root):
  """The Results of all runs in a folder and below it, by name.

  Those that a sweep has yet to begin are among them.
  """
  root, found = pathlib.Path(root), []
  for folder, below, files in os.walk(root):
    result = read(folder, root)
    if result is not None:
      found.append(result)
      below.clear()  # Checkpoints, and no more runs.
    elif SWEEP in files:
      names = (_json(pathlib.Path(folder, SWEEP)) or {}).get('runs', ())
      places = (pathlib.Path(folder, name) for name in names)
      found += [Result(place.relative_to(root).as_posix(), place, {}, {}, [],
                       None) for place in places if read(place) is None]
  return sorted(found, key=lambda result: result.name)


def _rows(path):
  """The rows that are whole; of a step that was done twice, both."""
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError):
    return []
  found = []
  for line in lines:
    try:
      row = json.loads(line)
    except ValueError:
      continue  # Cut off by a kill.
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      found.append(row)
  return found


def _json(path):
  try:
    found = json.loads(path.read_text())
    return found if isinstance(found, dict) else None
  except (OSError, ValueError):
    return None


def _error(folder):
  try:
    return (folder / ERROR).read_text().strip().splitlines()[-1]
  except (OSError, IndexError):
    return None
