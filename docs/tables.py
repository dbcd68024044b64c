"""Writes the tables of flags and options into docs/flags.md and docs/tasks.md.

  python -m docs.tables          # writes them
  python -m docs.tables --check  # fails if they are not what the code says
"""

import dataclasses
import pathlib
import re
import sys

import attention
from attention.common import options, specs
from configs import default
from train_lib import tasks
from train_lib.tasks import task

ROOT = pathlib.Path(__file__).parents[1]


def attention_flags():
  """Flags of attention with defaults, help and variants, as Markdown."""
  rows = ['| flag | default | meaning | variants |', '|---|---|---|---|']
  for name, field in default.groups()[default.ATTENTION].items():
    value = 'none' if field.default is None else field.default
    rows.append(f'| `{name}` | {value} | {_cell(options.text(field))} | '
                f'{", ".join(attention.users(name))} |')
  return '\n'.join(rows)


def all_flags():
  """Every other flag, group by group."""
  parts = []
  for title, table in default.groups().items():
    if title == default.ATTENTION:
      continue
    rows = [f'**{title}**', '', '| flag | default | meaning |', '|---|---|---|']
    for name, field in table.items():
      value = 'none' if field.default is None else field.default
      rows.append(
          f'| `{name}` | {_cell(repr(value) if value == chr(10) else value)} '
          f'| {_cell(options.text(field))} |')
    parts.append('\n'.join(rows))
  return '\n\n'.join(parts)


def task_options():
  """The options of every task."""
  rows = ['| task | option | default | meaning |', '|---|---|---|---|']
  common = {field.name for field in dataclasses.fields(task.Task)}
  for name, kind in [('every', task.Task),
                     *((name, tasks.get(name)) for name in tasks.names())]:
    rows += [
        f'| `{name}` | `{field.name}` | {specs.value_text(field.default)} | '
        f'{options.text(field)} |' for field in dataclasses.fields(kind)
        if name == 'every' or field.name not in common]
  return '\n'.join(rows)


def _cell(text):
  return str(text).replace('|', '\\|')


TABLES = {'attention-flags': attention_flags, 'all-flags': all_flags,
          'task-options': task_options}
FILES = ('docs/flags.md', 'docs/tasks.md')


def fill(text):
  """Replaces what stands between the markers of each table."""
  for name, make in TABLES.items():
    marker = re.compile(
        f'(<!-- {name} -->\n).*?(<!-- end of {name} -->)', re.DOTALL)
    text = marker.sub(lambda m, make=make: m[1] + make() + '\n' + m[2], text)
  return text


def main():
  stale = []
  for name in FILES:
    path = ROOT / name
    before = path.read_text()
    after = fill(before)
    if after != before:
      stale.append(name)
      if '--check' not in sys.argv:
        path.write_text(after)
  if stale and '--check' in sys.argv:
    sys.exit(f'{", ".join(stale)}: run python -m docs.tables')


if __name__ == '__main__':
  main()
