"""Times rivals in turns, each in a process of its own.

Thread pools of two libraries in one process get in each other's way. Here the
others wait while one runs, each with its default number of threads.
"""

import importlib.util
import multiprocessing
import os
import statistics
import time


def torch_is_here():
  return all(importlib.util.find_spec(n) for n in ('torch', 'transformers'))


def measure(rivals, *, rounds, one_core=False):
  """Seconds a unit of work, of every rival and round.

  Args:
    rivals: {name: (make, arguments)}. `make(*arguments)`, called in the
      rival's process, returns a function that works for a while and returns
      how many units it did, and anything to report.
    rounds: in each, every rival is called once.
    one_core: pin each to one core and count its CPU time: less disturbed on a
      busy machine, and silent on how well a library uses several cores.

  Returns:
    ({name: [seconds]}, {name: the report}).
  """
  context = multiprocessing.get_context('spawn')
  workers = {}
  for name, (make, arguments) in rivals.items():
    here, there = context.Pipe()
    process = context.Process(
        target=_work, args=(there, make, arguments, one_core), daemon=True)
    process.start()
    there.close()  # Else the death of a rival would go unnoticed.
    workers[name] = here, process
  reports = {name: here.recv() for name, (here, _) in workers.items()}
  seconds = {name: [] for name in rivals}
  for _ in range(rounds):
    for name, (here, _) in workers.items():
      here.send(True)
      seconds[name].append(here.recv())
  for here, process in workers.values():
    here.send(False)
    process.join()
  return seconds, reports


def _work(connection, make, arguments, one_core):
  if one_core:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
  clock = time.process_time if one_core else time.perf_counter
  work, report = make(*arguments)
  work()  # Compiles, and fills what is kept between calls.
  connection.send(report)
  while connection.recv():
    start = clock()
    units = work()
    connection.send((clock() - start) / units)


def ratio(times, base):
  """Text: the ratio of the least times, and quartiles over the rounds."""
  low, _, high = statistics.quantiles(a / b for a, b in zip(times, base))
  return f'{min(times) / min(base):6.2f}x {low:7.2f}-{high:.2f}x'
