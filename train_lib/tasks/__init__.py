"""Tasks as datasets: `--dataset='task:mqar(pairs=8, length=64)'`.

One file a task, whose name is the flag's value; its Task has the options.
"""

import dataclasses
import importlib
import pkgutil
import re

from attention.common.options import nearest, read_pairs

PREFIX = 'task:'
_INNER = {'dataset', 'randomness', 'task'}
_TEXT = re.compile(r'(\w+)(?:\((.*)\))?', re.DOTALL)


def names():
  """The tasks, in order of the alphabet."""
  return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)
                      if m.name not in _INNER))


def get(name):
  """The Task class of a name; ValueError for an unknown one."""
  if name not in names():
    raise ValueError(f'--dataset={PREFIX}{name}: there is no such task'
                     f'{nearest(name, names())} known: {", ".join(names())}')
  return importlib.import_module(f'{__name__}.{name}').Task


def named(dataset):
  """Whether a --dataset is a task."""
  return dataset.startswith(PREFIX)


def parse(dataset):
  """The task of a --dataset; ValueError: one line on what is wrong with it."""
  found = _TEXT.fullmatch(dataset.removeprefix(PREFIX).strip())
  if not found:
    raise ValueError(f'--dataset={dataset} is no task: write task:NAME or '
                     "task:NAME(option=value, ...), such as "
                     "'task:mqar(pairs=8, length=64)'")
  kind = get(found.group(1))
  return with_options(kind(), found.group(2) or '', flag=f'dataset={dataset}')


def slices(task, entries):
  """{entry: the task with its options} of the entries of --eval_slices."""
  found = {}
  for entry in entries or ():
    own = with_options(task, entry.removeprefix('(').removesuffix(')'),
                       flag=f'eval_slices={entry}')
    if own.vocab_size > task.vocab_size:
      raise ValueError(f'--eval_slices={entry} has {own.vocab_size} tokens, '
                       f'more than the {task.vocab_size} of {task}')
    found[entry] = own
  return found


def with_options(task, text, *, flag):
  """A task, or a slice, with the options of a text: 'pairs=8, length=64'."""
  fields = {field.name: field for field in dataclasses.fields(task)}
  values = read_pairs(
      text, fields, unknown=f'--{flag}: there is no option', where=f'--{flag}')
  try:
    return dataclasses.replace(task, **values)
  except ValueError as error:
    raise ValueError(f'--{flag}: {error}') from None
