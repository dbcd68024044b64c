"""What a sweep costs beside its steps, and what a report of many runs takes.

  python benchmarks/sweeps.py
  python benchmarks/sweeps.py --runs 6 --reported 200

A sweep of runs that differ in their seed alone: seconds of the first, which
compiles unless an earlier sweep has, and of each after it, less the seconds of
its steps, evaluations and saves included. The report is of copies of one of
these runs, as runs of eight variants with seeds.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

MAIN = pathlib.Path(__file__).parents[1] / 'main.py'
SWEEP = '''
def sweep():
  for seed in range({runs}):
    yield dict(seed=seed, n_layer=2, max_iters=50, eval_interval=25)
'''
VARIANTS = 8


def call(*flags):
  """Seconds of a command."""
  start = time.perf_counter()
  subprocess.run([sys.executable, str(MAIN), *flags], check=True,
                 stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def rows(folder):
  return [json.loads(line) for line in
          (folder / 'metrics.jsonl').read_text().splitlines()]


def spent(root):
  """Seconds of each run beside its steps, in the order in which they ended."""
  records = sorted(
      root.glob('*/run.json'), key=lambda path: path.stat().st_mtime)
  ends = [path.stat().st_mtime for path in records]
  steps = [rows(path.parent)[-1]['elapsed_s'] for path in records]
  return [end - begin - inside for begin, end, inside in zip(
      ends, ends[1:], steps[1:], strict=False)]


def copies(run, root, number):
  """Fills a folder with runs of VARIANTS variants."""
  config = json.loads((run / 'config.json').read_text())
  for i in range(number):
    folder = root / f'{i:03}'
    folder.mkdir(parents=True)
    for name in ('metrics.jsonl', 'run.json'):
      shutil.copy(run / name, folder / name)
    config.update(seed=i // VARIANTS, window_size=8 * (1 + i % VARIANTS))
    (folder / 'config.json').write_text(json.dumps(config))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--runs', type=int, default=6)
  parser.add_argument('--reported', type=int, default=200)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    path, root = scratch / 'seeds.py', scratch / 'runs'
    path.write_text(SWEEP.format(runs=flags.runs))
    whole = call('--mode=sweep', f'--sweep={path}', f'--workdir={root}')
    beside = spent(root)
    print('| | seconds |\n| --- | --: |')
    print(f'| a sweep of {flags.runs} runs | {whole:.1f} |')
    print('| a run after the first, beside its steps | '
          f'{statistics.median(beside):.2f} (most {max(beside):.2f}) |')
    one = next(root.glob('*/config.json')).parent
    many = scratch / 'many'
    copies(one, many, flags.reported)
    report = call('--mode=report', f'--workdir={many}')
    print(f'| a report of {flags.reported} runs | {report:.1f} |')


if __name__ == '__main__':
  main()
