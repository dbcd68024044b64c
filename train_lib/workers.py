"""--sweep_workers: a sweep by several processes of this machine.

Each has the same command and shares the runs as any two processes do. The cores
of the machine are dealt out to them, and so are its GPUs.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from train_lib import disk, preemption, results
from train_lib import sweep_table as table_lib

FOLDER = 'workers'  # What each would print, and the config that they are given.
MAIN = pathlib.Path(__file__).parents[1] / 'main.py'
POLL = 1.0  # Seconds between looks at the runs.
GPUS = pathlib.Path('/proc/driver/nvidia/gpus')


def supervise(config, points, root):
  """Has all runs made; returns {name: why it failed, or None}.

  Args:
    config: of the sweep; its workdir is not looked at.
    points: the grid.Points.
    root: the sweep's folder.

  Raises:
    ValueError: more workers than GPUs; or they ended, and runs are left.
    preemption.Stopped: a signal came, and the workers have saved.
  """
  places = deal(config.sweep_workers, os.environ)
  # Of each shard its own: other machines may be at the others.
  folder = root / FOLDER / (config.sweep_shard or '').replace('/', '-of-')
  path = folder / 'flags.json'
  write_flags(path, config, root, sweep_workers=1)
  stale = {p.name: results.failed_at(root / p.name) for p in points}
  left, ended = list(points), {}
  with contextlib.ExitStack() as stack:
    processes = [stack.enter_context(_worker(path, index, place))
                 for index, place in enumerate(places, 1)]
    live = stack.enter_context(table_lib.Live(points, root))
    try:
      while left:
        over = all(process.poll() is not None for process in processes)
        for point in list(left):
          found = results.read(root / point.name)
          error = found and found.error
          again = results.failed_at(root / point.name) == stale[point.name]
          if found and found.finished or error and not again:
            ended[point.name] = None if found.finished else error
            left.remove(point)
            live.ended(point, ended[point.name])
        if over and left:
          raise ValueError(
              f'the workers ended, and {len(left)} runs are left, '
              f'{left[0].name} the first: {folder} has what they said; '
              'the same command goes on')
        time.sleep(POLL if left else 0)
      for process in processes:
        process.wait()
    except KeyboardInterrupt:
      raise preemption.Stopped(
          'stopped by a signal; the same command goes on with the runs that '
          'are left') from None
  return ended


def write_flags(path, config, root, **changes):
  """Leaves the flags of a sweep for other processes, to be their --config.

  Args:
    path: the file. Not config.json, as it is no run.
    config: of the sweep.
    root: its folder.
    **changes: flags that are others for them.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  disk.write_json(path, {**config.to_dict(), 'workdir': str(root), **changes})


def command(path, *more):
  """The command of a process with the flags of a file, and some more."""
  return [sys.executable, str(MAIN), f'--config={path}', *more]


def deal(workers, environment):
  """[(variables, cores or None)] of each worker.

  Raises:
    ValueError: there are fewer GPUs than workers.
  """
  gpus = _gpus(environment)
  if gpus:
    if workers > len(gpus):
      raise ValueError(f'sweep_workers ({workers}) must be at most '
                       f'{len(gpus)}, the GPUs that there are')
    return [({'CUDA_VISIBLE_DEVICES': ','.join(gpus[i::workers])}, None)
            for i in range(workers)]
  if not hasattr(os, 'sched_getaffinity'):
    return [({}, None)] * workers
  cores = sorted(os.sched_getaffinity(0))
  return [({}, set(cores[i::workers]) or {cores[i % len(cores)]})
          for i in range(workers)]


def _gpus(environment):
  """The names of the GPUs that jax would use, as CUDA has them."""
  if environment.get('JAX_PLATFORMS', 'cuda').split(',')[0] not in (
      'cuda', 'gpu') or not GPUS.is_dir():
    return []
  visible = environment.get('CUDA_VISIBLE_DEVICES')
  if visible is None:
    return [str(i) for i, _ in enumerate(GPUS.iterdir())]
  return [name for name in visible.split(',') if name]


@contextlib.contextmanager
def _worker(path, index, place):
  """A process, that is stopped and has saved when this is left."""
  variables, cores = place
  with open(path.parent / f'{index}.txt', 'a') as log:
    # In a session of its own: Ctrl-C would reach it, and so would our signal.
    process = subprocess.Popen(
        command(path), stdout=log, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, env={**os.environ, **variables},
        start_new_session=True)
    if cores:  # Before it has imported what starts threads.
      with contextlib.suppress(OSError):
        os.sched_setaffinity(process.pid, cores)
    try:
      yield process
    finally:
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait()
