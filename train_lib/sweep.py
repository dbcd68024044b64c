"""--mode=sweep: the runs of a file, one after the other, each in its folder.

What was done is read from the folders alone, so that a sweep goes on after
whatever ended it, and any number of processes share one.
"""

import contextlib
import dataclasses
import pathlib
import time
import traceback

import jax

from configs import grid
from train_lib import (
    budget,
    disk,
    lock,
    matching,
    preemption,
    results,
    run,
    slurm,
    trainer,
    workers,
)
from train_lib import sweep_table as table_lib

LOG = 'log.txt'  # What a run would print.
CLAIM = 'claim'  # The lock of the process whose turn a run is.
CACHE_BYTES = 4 << 30  # Of compiled programs, the newest ones.
# Seconds between looks at runs that other processes are at.
POLL = 3.0

EXPECTED = (OSError, ValueError, NotImplementedError, ImportError)


def sweep(config):
  """Runs what --sweep says, or lists it with --dry_run.

  Args:
    config: what every run begins from.

  Raises:
    ValueError: one line on what does not fit, before anything is spent; or,
      at the end, how many runs failed.
    preemption.Stopped: a signal came; the same command goes on.
  """
  if not config.sweep:
    raise ValueError('--mode=sweep needs --sweep: a Python file whose sweep() '
                     'yields dicts of flags, or an exploration .yaml')
  if config.sweep_workers > 1 or config.sweep_slurm:  # The devices are theirs.
    jax.config.update('jax_platforms', 'cpu')
  if jax.process_count() > 1:
    raise ValueError('--mode=sweep is of one process: start one for each '
                     'device, with --sweep_shard')
  root = run.folder_of(config.workdir or pathlib.Path(
      'runs', pathlib.Path(config.sweep).stem))
  points = matching.matched(grid.load(config.sweep, config), config.match)
  slurm.check(config, points)
  mine = grid.shard(points, config.sweep_shard)
  _check_folders(points, root)
  costs = budget.costs(mine)
  print(budget.table(mine, costs, root), flush=True)
  if config.dry_run:
    return
  run.make_workdir(root, config)
  _write(root, points, config)
  if config.sweep_slurm:
    slurm.submit(config, root)
    return
  if config.sweep_workers > 1:
    ended = workers.supervise(config, mine, root)
  else:
    with contextlib.suppress(OSError):  # Then every run compiles.
      _share_programs()
    ended = _Sweep(mine, root).go()
  _conclude(mine, root, ended)


def _conclude(points, root, ended):
  """Prints the table; ValueError if some of {name: why it failed} have."""
  print('\n' + table_lib.final(points, root, ended), flush=True)
  failed = [name for name, why in ended.items() if why]
  if failed:
    raise ValueError(
        f'{len(failed)} of {len(points)} runs failed, the first with: '
        f'{ended[failed[0]]} ({root / failed[0] / results.ERROR}); the same '
        'command tries them again')


def _check_folders(points, root):
  """ValueError if a folder holds another run than the sweep would put there.

  The same name would otherwise stand for what one file says and another did.
  """
  for point in points:
    found = results.read(root / point.name)
    changed = grid.same(point.config, found.config) if (
        found and found.config) else []
    if changed:
      flag = changed[0]
      raise ValueError(
          f'{root / point.name} holds a run with {flag}='
          f'{found.config.get(flag)}, the sweep has {point.config[flag]}: '
          'delete that folder, or name another --workdir')


def _write(root, points, config):
  """Leaves sweep.json: what the sweep is made of, for the report."""
  # Whoever has the lock writes the same.
  with contextlib.suppress(lock.Taken), lock.Lock(root):
    disk.write_json(root / results.SWEEP, {
        'sweep': str(config.sweep), 'match': config.match,
        'runs': {point.name: point.given for point in points}})


def _share_programs():
  """Has a program be compiled once for all runs, on disk and in this process.

  Runs of one shape differ in constants at most; what does not is found again.
  """
  folder = budget.cache_folder()
  folder.mkdir(parents=True, exist_ok=True)
  disk.keep_newest(folder, CACHE_BYTES)
  for name, value in (
      ('jax_compilation_cache_dir', str(folder)),
      ('jax_persistent_cache_min_compile_time_secs', 0.2),
      ('jax_persistent_cache_min_entry_size_bytes', -1)):
    jax.config.update(name, value)


@dataclasses.dataclass
class _Sweep:
  """The runs of this process and where they are."""
  points: list
  root: pathlib.Path

  def go(self):
    """Makes every run that is to be made; {name: why it failed, or None}."""
    # What failed before is tried again, once, unless another process has.
    stale = {p.name: results.failed_at(self.root / p.name)
             for p in self.points}
    left, ended = list(self.points), {}
    with table_lib.Live(self.points, self.root) as live:
      while left:
        waiting = []
        for point in left:
          try:
            ended[point.name] = self._visit(point, stale[point.name], live)
          except lock.Taken:
            waiting.append(point)
            continue
          live.ended(point, ended[point.name])
        if len(waiting) == len(left):
          live.wait(len(waiting))
          time.sleep(POLL)
        left = waiting
    return ended

  def _visit(self, point, stale, live):
    """Makes a run unless it is done; returns why it failed, or None.

    Raises lock.Taken while another process is at it.
    """
    folder = self.root / point.name
    try:
      folder.mkdir(parents=True, exist_ok=True)
      # Whoever has the claim reads how far the run is, then starts it.
      with lock.Lock(folder, CLAIM):
        found = results.read(folder)
        if found and found.finished:
          return None
        if found and found.error and results.failed_at(folder) != stale:
          return found.error
        return self._make(point, folder, live)
    except OSError as error:
      return str(error)

  def _make(self, point, folder, live):
    (folder / results.ERROR).unlink(missing_ok=True)
    config = point.config.copy_and_resolve_references()
    live.begin(point)
    try:
      with (open(folder / LOG, 'a', errors='backslashreplace') as log,
            contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        trainer.train(config, folder)
    except lock.Taken:
      raise
    except KeyboardInterrupt:
      raise preemption.Stopped(
          'stopped by a signal; the same command goes on with the runs that '
          'are left') from None
    except EXPECTED as error:
      return _keep(folder, str(error) or type(error).__name__)
    except Exception as error:  # Of a variant: of no concern to the others.
      return _keep(folder, traceback.format_exc() + type(error).__name__
                   + f': {error}'.splitlines()[0])
    return None


def _keep(folder, error):
  """Leaves error.txt, where the disk takes it; returns its last line."""
  with contextlib.suppress(OSError):
    disk.write_whole(folder / results.ERROR, f'{error}\n'.encode())
  return error.splitlines()[-1]
