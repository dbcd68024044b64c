"""From a command line to a config: every spelling of a flag, one meaning."""

import collections
import importlib.util
import json
import os
import pathlib

from attention.common import options
from configs import default


class FlagError(ValueError):
  """A command line that cannot be understood; the message is one line."""


def split(argv, fields):
  """Splits a command line into ({flag: text}, the config's path, the rest).

  Takes --flag=v, --flag v, --config.flag=v, --flag, --noflag, and lists as
  --flag a b, --flag=a,b or --flag=a --flag=b. What is not a flag of the
  project is left over for absl.
  """
  texts, config, rest = {}, None, []
  tokens = collections.deque(argv)
  while tokens:
    token = tokens.popleft()
    name, equals, value = token.lstrip('-').partition('=')
    name = name.removeprefix('config.')
    if not token.startswith('--'):
      raise FlagError(f'{token!r} is not a flag: flags begin with --')
    field, text = fields.get(name), value if equals else None
    if name == 'config':
      config = text if equals else (tokens.popleft() if tokens else None)
      if not config:
        raise FlagError('--config needs a path: a .py or a .json file')
      continue
    if field is None and name.startswith('no') and _is_bool(fields, name[2:]):
      if equals:
        raise FlagError(f'--{name} takes no value')
      texts[name[2:]] = 'false'
      continue
    if field is None:
      rest.append(token)
      while tokens and not equals and not tokens[0].startswith('--'):
        rest.append(tokens.popleft())
      continue
    kind, _ = options.types(field)
    if name in texts and field.metadata['once']:
      raise FlagError(f'--{name} is given twice: give it once')
    if not equals:
      text = _following(tokens, kind, field)
    if kind is tuple and text is not None and texts.get(name):
      text = f'{texts[name]},{text}'
    texts[name] = text
  return texts, config, rest


def _is_bool(fields, name):
  """Whether a flag may stand alone, and hence be switched off by `no`."""
  return name in fields and (options.types(fields[name])[0] is bool
                             or fields[name].metadata['bare'] is not None)


def _following(tokens, kind, field):
  """Takes the value of `--flag value` from the tokens that follow."""
  taken = []
  while tokens and not tokens[0].startswith('--'):
    likely = tokens[0].lower() in options.TRUE + options.FALSE
    if kind is bool and not likely:
      break
    taken.append(tokens.popleft())
    if kind is not tuple:
      break
  return ','.join(taken) if taken else None


def load(path):
  """The config of a file: get_config() of a .py, or a run's config.json."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FlagError(f'--config={path}: no such file')
  if path.suffix == '.json':
    try:
      values = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
      raise FlagError(f'--config={path} is not the JSON of a config') from None
    return update(default.get_config(), values, source=str(path))
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None:
    raise FlagError(f'--config={path} is neither a .py nor a .json file')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise FlagError(f'--config={path} has no function get_config')
  return module.get_config()


def of_run(workdir):
  """The config of a run: of its config.json or, that gone, of a checkpoint.

  None where there is no run.
  """
  folder = pathlib.Path(os.path.expanduser(workdir))
  if (folder / 'config.json').is_file():
    return load(folder / 'config.json')
  # Orbax keeps what a checkpoint says of its run as JSON.
  found = [path for path in folder.glob('checkpoints/*/meta/metadata')
           if path.parts[-3].isdigit()]
  for path in sorted(found, key=lambda path: int(path.parts[-3]))[::-1]:
    try:
      values = dict(json.loads(path.read_text())['meta']['config'])
    except (OSError, ValueError, TypeError, KeyError):
      continue  # An older one may be whole.
    return update(default.get_config(), values, source=str(path))
  return None


def update(config, values, *, source):
  """Sets flags from a dict; an unknown one is an error that names `source`."""
  fields = default.fields()
  for name, value in values.items():
    if name not in config:
      raise FlagError(f'{source}: unknown flag {name}'
                      + options.nearest(name, config))
    value = tuple(value) if isinstance(value, list) else value
    kind, _ = options.types(fields[name])
    try:
      if isinstance(value, bool) and kind is not bool:
        raise TypeError  # A ConfigDict would take true for 1.0.
      config[name] = value
    except TypeError:
      raise FlagError(f'{source}: {name}={value!r} is not '
                      + options.takes(fields[name])) from None
  return config


def parse(argv, *, others=(), config=None):
  """A command line (without the program's name) to a config.

  Args:
    argv: list of strings.
    others: names of flags that belong to someone else (absl).
    config: what to start from when no --config is given; by default the
      default config.

  Returns:
    (locked ConfigDict, names of the flags that were given, arguments for
    the others).

  Raises:
    FlagError: one line that names the flag, the value and the way out.
  """
  fields = default.fields()
  texts, path, rest = split(argv, fields)
  for token in (t for t in rest if t.startswith('--')):
    name = token.lstrip('-').partition('=')[0]
    if name not in others and name.removeprefix('no') not in others:
      raise FlagError(f'unknown flag --{name}' + options.nearest(name, fields))
  if path:
    config = load(path)
  elif texts.get('mode') in ('eval', 'sample') and texts.get('workdir'):
    # What reads a run takes the run's config.
    config = of_run(texts['workdir']) or config
  config = config or default.get_config()
  values = {}
  for name, text in texts.items():
    try:
      values[name] = options.convert(fields[name], text)
    except ValueError as error:
      raise FlagError(f'--{error}') from None
  config = update(config, values, source='command line')
  try:
    default.check(config)
  except ValueError as error:
    raise FlagError(str(error)) from None
  for name in default.Sweep.__dataclass_fields__:
    if config.mode != 'sweep' and (
        values.get(name, fields[name].default) != fields[name].default):
      raise FlagError(f'--{name} has no effect: it is of --mode=sweep')
  return config, set(values), rest
