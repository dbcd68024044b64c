"""The table of a sweep: a line for each run that ends, one below that moves."""

import sys
import textwrap
import threading

from train_lib import metrics, results

REFRESH = 1.0  # Seconds between looks at the run that is being made.
ERROR_WIDTH = 60  # Characters of it in a table; error.txt has the rest.


class Live:
  """While entered, says what the sweep is at.

  On a terminal the last line shows the run that is being made and is written
  over; elsewhere there is a line when a run begins, and no control character.

  Args:
    points: the grid.Points of this process.
    root: the sweep's folder.
  """

  def __init__(self, points, root):
    self.points, self.root = points, root
    self._out = sys.stdout  # A run's own output goes elsewhere.
    self._moves = self._out.isatty()
    self._left = {point.name for point in points}
    self._best, self._current, self._waiting = None, None, False
    self._seconds = []
    self._over, self._lock = threading.Event(), threading.Lock()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def begin(self, point):
    """A run is about to be made."""
    self._current, self._waiting = point, False
    if not self._moves:
      self._say(f'{self._count()}  {point.name}  begins{self._time_left()}')

  def ended(self, point, error):
    """A run is done, by whomever, or failed with an error."""
    self._current = None
    self._left.discard(point.name)
    found = results.read(self.root / point.name)
    parts = [f'{self._count()}  {point.name}']
    if error:
      parts.append(f'failed: {error}')
    elif found:
      parts += [f'{found.metric} {metrics.short(found.score)}'
                if found.metric else 'finished', f'{found.seconds:,.0f} s']
      self._seconds.append(found.seconds)
      if found.metric and results.better(
          found.metric, found.score, self._best and self._best.score):
        self._best = found
        parts.append('best so far')
    self._say('  '.join(parts))

  def wait(self, count):
    """Nothing to do but for runs that other processes are at."""
    if not self._waiting:
      self._say(f'{count} runs are being made by other processes: waiting')
    self._waiting = True

  def _count(self):
    done = len(self.points) - len(self._left)
    return f'[{done}/{len(self.points)}]'

  def _time_left(self):
    if not self._seconds:
      return ''
    mean = sum(self._seconds) / len(self._seconds)
    return f', about {duration(mean * len(self._left))} left'

  def _say(self, line):
    with self._lock:
      print('\r\x1b[K' * self._moves + line, file=self._out, flush=True)

  def _watch(self):
    while not self._over.wait(REFRESH):
      point = self._current
      found = point and results.read(self.root / point.name)
      if found is None:
        continue
      parts = [self._count(),
               f'step {found.step:,} of {point.config.max_iters:,}']
      if found.metric:
        parts.append(f'{found.metric} {metrics.short(found.score)}')
      if self._best:
        parts.append(f'best {metrics.short(self._best.score)}')
      # The name comes last, as it may be too long for the line.
      line = '  '.join(parts) + f'{self._time_left()}  {point.name}'
      with self._lock:
        self._out.write(f'\r\x1b[K{line[:metrics.columns(self._out)]}')
        self._out.flush()

  def __enter__(self):
    if self._moves:
      self._thread.start()
    return self

  def __exit__(self, *error):
    self._over.set()
    if self._moves:
      self._thread.join()
      print('\r\x1b[K', end='', file=self._out, flush=True)


def final(points, root, errors):
  """The table at the end, the best run first, as text."""
  found = {p.name: results.read(root / p.name) for p in points}
  rows = [('run', 'state', 'score', 'seconds', '')]
  scored = [r for r in found.values() if r and r.finished and r.metric]
  sign = -1 if scored and results.higher_is_better(scored[0].metric) else 1
  ranked = sorted(scored, key=lambda r: sign * r.score)
  rows += [(r.name, r.state, f'{r.metric} {metrics.short(r.score)}',
            f'{r.seconds:,.0f}', '') for r in ranked]
  done = {r.name for r in ranked}
  for point in points:
    if point.name not in done:
      error = errors.get(point.name) or ''
      rows.append((point.name, 'failed' if error else 'finished', '', '',
                   textwrap.shorten(error, ERROR_WIDTH, placeholder=' ...')))
  return metrics.columns_of(rows)


def duration(seconds):
  """Seconds as people say them."""
  if seconds < 90:
    return f'{seconds:.0f} s'
  minutes = seconds / 60
  return f'{minutes:.0f} min' if minutes < 90 else f'{minutes / 60:.1f} h'
