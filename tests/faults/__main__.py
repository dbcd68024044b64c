"""Lets things happen to a tiny run: python -m tests.faults --minutes=10.

After every event the plain command must end with the parameters and the rows
of metrics of an undisturbed run, or say in one line why not, and nothing good
may have been moved. The same seed gives the same events, though not at the
same microsecond. Exit code 1 if the invariant was violated; the workdirs of
those events are kept.
"""

import argparse
import collections
import itertools
import sys
import tempfile
import time

from tests.faults import bench, events


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--minutes', type=float, default=5)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', choices=[e.__name__ for e in events.EVENTS])
  args = parser.parse_args()
  chosen = [event for event in events.EVENTS
            if args.only in (None, event.__name__)]
  folder = tempfile.mkdtemp(prefix='faults-')
  deadline = time.time() + 60 * args.minutes
  known, counts = bench.Bench(folder), collections.Counter()
  for number in itertools.count():
    if time.time() > deadline:
      break
    event = chosen[number % len(chosen)]
    seed, started = f'{args.seed}-{number}', time.time()
    try:
      result = events.happen(event, seed, known)
    except events.Violated as error:
      result = f'VIOLATED: {error}'
    counts[event.__name__, result.split(':')[0]] += 1
    print(f'{event.__name__} {seed}: {result} ({time.time() - started:.0f} s)',
          flush=True)
  violated = sum(n for (_, result), n in counts.items() if result == 'VIOLATED')
  print(f'\n{counts.total()} events, {violated} violated, in {folder}')
  for (name, result), n in sorted(counts.items()):
    print(f'  {name:<20} {result:<16} {n}')
  sys.exit(violated > 0)


if __name__ == '__main__':
  main()
