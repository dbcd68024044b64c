"""Sweeps: a Python file whose sweep() yields a dict of flags for each run.

An exploration file of ReaLLM-Forge is one too: configs/exploration.py.

  from configs.grid import product

  def sweep():
    yield from product(attention_variant=['causal', 'ssm'], seed=[1, 2],
                       max_iters=500)
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re

import attention
from configs import default, exploration, flags

# Where a run is and what is done with it: the sweep's own business.
OWN = ('mode', 'workdir', 'distributed',
       *(field.name for field in dataclasses.fields(default.Sweep)))

LONGEST = 120  # Characters of a name; file systems take 255 bytes.


@dataclasses.dataclass(frozen=True)
class Point:
  """A run of a sweep.

  Attributes:
    name: of its folder.
    config: its config, locked.
    given: {flag: value} as the sweep gave it.
  """
  name: str
  config: object
  given: dict


def product(**flags):
  """A dict for each combination of the values of flags.

  A list has the values that a flag takes; anything else is its one value. A
  flag that is a list itself takes a tuple: attention_list=('causal', 'ssm').
  The last flag changes fastest.
  """
  for values in itertools.product(*map(_values, flags.values())):
    yield dict(zip(flags, values))


def zip_(**flags):
  """A dict of the first values of all flags, one of the second ones, ...

  Lists and single values are as of `product`.

  Raises:
    ValueError: the lists are not of one length.
  """
  lengths = {name: len(v) for name, v in flags.items() if isinstance(v, list)}
  if len(set(lengths.values())) > 1:
    raise ValueError('zip_ needs lists of one length, not of ' + ', '.join(
        f'{length} ({name})' for name, length in lengths.items()))
  for i in range(max(lengths.values(), default=1)):
    yield {name: value[i] if isinstance(value, list) else value
           for name, value in flags.items()}


def _values(value):
  return value if isinstance(value, list) else [value]


def load(path, base):
  """The runs of a sweep's file.

  Args:
    path: of the Python file, or of an exploration file.
    base: the config that they change, as the command line has it.

  Returns:
    A list of Points. A dict may hold `name`, the folder's; else the name is
    made of the flags whose values differ.

  Raises:
    ValueError: one line on what no run can be made of.
  """
  dicts = [dict(given) for given in _call(path)]
  if not dicts:
    raise ValueError(f'--sweep={path}: yields no run')
  made = iter(names([given for given in dicts if 'name' not in given]))
  points = []
  for given in dicts:
    name = str(given.pop('name')) if 'name' in given else next(made)
    points.append(Point(name, _config(given, base, path), given))
  _check_names(points, path)
  return points


def _call(path):
  path = pathlib.Path(path)
  if not path.is_file() or path.suffix not in ('.py', *exploration.SUFFIXES):
    raise ValueError(f'--sweep={path}: no such .py or .yaml file')
  if path.suffix != '.py':
    return exploration.read(path)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'sweep'):
    raise ValueError(f'--sweep={path} has no function sweep')
  return list(module.sweep())


def _config(given, base, path):
  config = base.copy_and_resolve_references()
  for flag in default.Sweep.__dataclass_fields__:
    config[flag] = default.fields()[flag].default
  config.mode, config.workdir = 'train', None
  for flag in OWN:
    if flag in given:
      raise ValueError(f'--sweep={path}: {flag} is not for a run to say: give '
                       'it on the command line')
  if 'attention_variant' in given and 'attention_list' not in given:
    config.attention_list = None  # It would win over the variant.
  flags.update(config, given, source=f'--sweep={path}')
  try:
    default.check(config)
  except ValueError as error:
    raise ValueError(f'--sweep={path}: {_told(given)}: {error}') from None
  return config


def _told(given):
  return ', '.join(f'{flag}={value}' for flag, value in given.items())


def names(dicts):
  """A readable name for each dict of flags, of the values that differ.

  'ssm,learning_rate=0.003,seed=1': variants and lists of layers speak for
  themselves. Only letters, digits and .,+=-_ are left, so that a shell takes
  the name as it is.
  """
  every = list(dict.fromkeys(flag for given in dicts for flag in given))
  varied = [flag for flag in every
            if len({repr(given.get(flag)) for given in dicts}) > 1]
  return [_name(given, varied) for given in dicts]


def _name(given, varied):
  parts = []
  for flag in varied or [f for f in given if f.startswith('attention_')]:
    if flag in given:
      value = given[flag]
      text = '-'.join(map(str, value)) if isinstance(
          value, (tuple, list)) else str(value)
      alone = flag in ('attention_variant', 'attention_list')
      parts.append(text if alone else f'{flag}={text}')
  name = re.sub(r'[^\w.,+=-]+-*', '-', ','.join(parts)).strip('-.') or 'run'
  if len(name) > LONGEST:
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    name = f'{name[:LONGEST - 9]}-{mark}'
  return name


def _check_names(points, path):
  seen = {}
  for point in points:
    if not re.fullmatch(r'\w[\w.,+=-]*', point.name):
      raise ValueError(f'--sweep={path}: name {point.name!r} may have letters, '
                       'digits and .,+=-_ alone, and begins with one of the '
                       'first two')
    first = seen.setdefault(point.name, point)
    if first is not point:
      what = 'the same run' if first.given == point.given else 'one name'
      raise ValueError(f'--sweep={path}: two dicts are {what}, {point.name}: '
                       'leave one out, or give them a `name` each')


def shard(points, text):
  """Every Nth point from the Ith on, of 'I/N'; all of them for None.

  Raises:
    ValueError: I is not one of 1 to N.
  """
  if text is None:
    return points
  match = re.fullmatch(r'(\d+)/(\d+)', text)
  index, count = map(int, match.groups()) if match else (0, 0)
  if not 1 <= index <= count:
    raise ValueError(f'sweep_shard={text} is not I/N with I from 1 to N: '
                     '1/16 to 16/16 are the shards of 16 jobs')
  return points[index - 1::count]


def same(config, saved):
  """The flags, of those that say what a run computes, with other values.

  Args:
    config: a config.
    saved: the JSON of a run's, in which some flags are resolved.
  """
  resolved = {'vocab_size', 'mesh_data', 'mesh_fsdp', 'mesh_tensor',
              *OWN, *default.Sampling.__dataclass_fields__}
  if config.dataset.startswith('task:'):
    resolved.add('block_size')  # It is the rows'.
  now = json.loads(json.dumps(config.to_dict()))
  if config.attention_list:
    now['attention_list'] = [str(layer) for layer in attention.listed(config)]
  return [flag for flag, field in default.fields().items()
          if flag not in resolved
          and now[flag] != saved.get(flag, field.default)]
