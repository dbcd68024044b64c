"""--mode=report: what all runs of a folder say together."""

import csv
import io
import json
import shlex

from train_lib import comparison as comparison_lib
from train_lib import disk, page, plots, results, run, tables


def report(config):
  """Writes report/: index.html, report.md, its plots, results.csv.

  Args:
    config: its workdir is a folder of runs, of sweeps, or one run.

  Returns:
    The Comparison.

  Raises:
    ValueError: there is no run, or none has finished; a package is missing.
  """
  if not config.workdir:
    raise ValueError('--mode=report needs --workdir: a folder of runs')
  root = run.folder_of(config.workdir)
  plots.matplotlib()
  runs = results.find(root)
  if not runs:
    raise ValueError(f'--workdir={root} has no runs: name a folder of runs, or '
                     'of sweeps')
  try:
    compared = comparison_lib.compare(runs)
  except ValueError as error:
    raise ValueError(f'--workdir={root}: {error}') from None
  parts = page.sections(compared, _commands(runs))
  folder = run.make_workdir(root / 'report', config)
  for name, text in (
      ('index.html', page.as_html(root.name, compared, parts)),
      ('report.md', page.as_markdown(root.name, compared, parts)),
      *page.pictures(compared, parts).items(),
      ('results.csv', _csv(compared))):
    disk.write_whole(folder / name, text.encode())
  print(f'{tables.summary(compared)}\n\n{folder / "index.html"}, report.md, '
        f'results.csv: {len(runs)} runs', flush=True)
  return compared


def _commands(runs):
  """What to type to have the same again."""
  own = dict.fromkeys(r.record['command'] for r in runs if r.record)
  one = next(run.folder for run in runs if run.finished)
  return [*own, '# one run again, of all its flags:', shlex.join([
      'python', 'main.py', f'--config={one / "config.json"}',
      '--workdir=runs/again'])]


def _csv(compared):
  """A row for each run, as text."""
  flags = [*compared.differing, 'seed']
  columns = sorted({name for run in compared.runs for name in run.last
                    if name.startswith('val_') or name == 'bits_per_byte'})
  text = io.StringIO()
  out = csv.writer(text, lineterminator='\n')
  out.writerow(['run', 'state', 'metric', 'score', *flags, *columns, 'step',
                'tokens', 'seconds', 'parameters', 'state_bytes',
                'flops_per_token', 'commit', 'error'])
  for run_ in compared.runs:
    out.writerow([
        run_.name, run_.state, run_.metric, run_.score,
        *(_plain(run_.config.get(flag)) for flag in flags),
        *(run_.last.get(name) for name in columns), run_.step,
        run_.last.get('tokens'), run_.seconds, run_.record.get('parameters'),
        run_.state_bytes(), run_.record.get('flops_per_token'),
        run_.record.get('commit'), run_.error])
  return text.getvalue()


def _plain(value):
  return json.dumps(value) if isinstance(value, (list, dict)) else value
