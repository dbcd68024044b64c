"""ReaLLM-Forge's exploration files (YAML or JSON) as sweeps.

A file is one or several mappings, each of which makes runs of its own:

  n_embd: [128, 256]                    # a list: one run each
  seed: {range: {start: 1, end: 3}}     # 1, 2, 3; step is 1, or 0.1
  attention_variant: infinite           # a single value
  use_concat_heads: [true, false]
  n_cproj:                              # only where all conditions hold
    conditions: [[use_concat_heads, false]]
    options: [1, 2]
  parameter_groups:                     # one of them at a time
    - {n_head: [4], n_kv_group: [1, 2, 4]}
    - {n_head: [6], n_kv_group: [1, 3]}
  common_group: {max_iters: 500}        # the same in all runs

Groups with a name are written once, here or in named_group_libraries, and used
in any mapping by named_group_static, named_group_variations or, one of them at
a time, named_group_alternates.
"""

import functools
import itertools
import math

import yaml

import attention
from attention.common import options
from configs import default

SUFFIXES = ('.yaml', '.yml', '.json')
MOST = 100_000  # Runs of a file, and values of a range.

_DEFINED = ('named_static_groups', 'named_variation_groups')
_GROUP = ('named_group', 'named_group_settings', 'named_group_static',
          'named_group_variations', 'named_group_alternates',
          'parameter_groups')  # What a group may have beside flags.
_KEYS = (*_DEFINED, *_GROUP, 'named_group_libraries', 'common_group')

# What has another name here, or another value of that text.
_RENAMED = {
    'mlp_size': ('mlp_width', {}),
    'wte_weight_tying': ('tie_embeddings', {}),
    'mlp_variant': ('mlp_variant', {'mlp': 'gelu'})}

_PER_LAYER = '_layerlist'  # How flags end that have a value for each layer.


def read(path):
  """The runs of a file: a list of dicts of flags.

  Prints one line that names what was left out: flags that do not exist here.
  Runs that differ in nothing else are one.

  Args:
    path: a pathlib.Path.

  Raises:
    ValueError: one line on what no run can be made of.
  """
  unknown = {}
  try:
    made = [_translated(given, unknown)
            for mapping in _load(path) for given in _runs(mapping, path)]
  except ValueError as error:
    raise ValueError(f'--sweep={path}: {error}') from None
  except RecursionError:
    raise ValueError(f'--sweep={path}: a group contains itself') from None
  if not any(made):
    if unknown:
      raise ValueError(f'--sweep={path}: no flag of it exists here: '
                       + ', '.join(unknown))
    return []
  found = list({repr(given): given for given in made}.values())
  if unknown:
    same = len(made) - len(found)
    print(f'--sweep={path}: left out, as no flags here: {", ".join(unknown)}'
          + f'; {same} of {len(made)} runs differ in nothing else' * bool(same))
  return found


def _load(path):
  """The mappings of a file."""
  try:
    loaded = list(yaml.safe_load_all(path.read_text()))
  except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
    mark = getattr(error, 'problem_mark', None)
    where = f', line {mark.line + 1}' if mark else ''
    raise ValueError(f'{path.name} is no YAML{where}: '
                     + ' '.join(str(error).split())) from None
  loaded = [part for entry in loaded for part in _listed(entry)]
  for entry in loaded:
    _check_mapping(entry, f'{path.name} has runs, which', _KEYS)
  return loaded


def _check_mapping(entry, what, keys=_GROUP):
  """ValueError for what is no mapping, or has other keys of groups than these.

  Args:
    entry: to be checked.
    what: it is, for the message.
    keys: that it may have beside flags.
  """
  if not isinstance(entry, dict) or not all(isinstance(k, str) for k in entry):
    raise ValueError(f'{what} must be a mapping of flags to values, not '
                     f'{entry!r:.60}')
  for key in entry:
    if (key.startswith('named_') or key in _KEYS) and key not in keys:
      raise ValueError(
          f'{key} has no place in {what.split(", ")[0]}' if key in _KEYS else
          f'unknown key {key}{options.nearest(key, _KEYS)}')


def _listed(value):
  """A list as it is; nothing as an empty one; anything else as its entry."""
  if value is None:
    return []
  return value if isinstance(value, list) else [value]


def _runs(mapping, path):
  """Every run of a mapping: a dict of flags and values as the file has them."""
  named = {key: {} for key in _DEFINED}
  _define(mapping, named, 'the file')
  for name in _listed(mapping.get('named_group_libraries')):
    library = path.parent / str(name)
    if not library.is_file():
      raise ValueError(f'named_group_libraries: {library}: no such file')
    for entry in _load(library):
      for key in entry.keys() - {*_DEFINED}:
        raise ValueError(f'named_group_libraries: {name} has {key}, which is '
                         'no group with a name')
      _define(entry, named, str(name))
  common = {}
  group = mapping.get('common_group', {})
  _check_mapping(group, 'common_group', ())
  for flag, value in group.items():
    values = _values(flag, value)
    if len(values) != 1:
      raise ValueError(f'common_group: {flag} must have one value')
    common[flag], = values
  for flat in _expanded(mapping, named):
    for given in _product(flat):
      for flag, value in common.items():
        if given.get(flag, value) != value:
          raise ValueError(f'common_group has {flag}={value}, a run '
                           f'{given[flag]}: leave one out')
      yield {**common, **given}


def _define(mapping, named, where):
  """Adds the named groups of a mapping to {key: {name: group}}."""
  for key in _DEFINED:
    for group in _listed(mapping.get(key)):
      _check_mapping(group, f'{key} has groups, which')
      name = group.get('named_group')
      if not name:
        raise ValueError(f'{key} has a group without a named_group: its name')
      if name in named[key]:
        raise ValueError(f'{key} has two groups {name}, one of {where}')
      named[key][name] = group


def _expanded(mapping, named, inside=()):
  """A list of mappings without groups, in place of one with them.

  Args:
    mapping: flags, values and groups.
    named: of _define.
    inside: names of the groups that this one is in.
  """
  def of(name, keys):
    group = next((named[key][name] for key in keys if name in named[key]), None)
    if group is None:
      known = [known for key in keys for known in named[key]]
      raise ValueError(f'no named group {name!r}{options.nearest(name, known)} '
                       f'known: {", ".join(map(str, known)) or "none"}')
    if name in inside:
      raise ValueError('named groups contain each other: '
                       + ' in '.join(map(str, (name, *inside[::-1]))))
    return _expanded(group, named, (*inside, name))

  own = {key: value for key, value in mapping.items()
         if key not in _KEYS}
  settings = mapping.get('named_group_settings', {})
  _check_mapping(settings, 'named_group_settings', ())
  found = [_joined(own, settings)]
  parts = []
  for name in _listed(mapping.get('named_group_static')):
    parts.append(of(name, _DEFINED[:1]))
    if len(parts[-1]) != 1:
      raise ValueError(f'named group {name} is static, and has '
                       f'{len(parts[-1])} alternatives: make it a variation')
  parts += [of(name, _DEFINED[1:])
            for name in _listed(mapping.get('named_group_variations'))]
  names = _listed(mapping.get('named_group_alternates'))
  if names:
    parts.append([flat for name in names for flat in of(name, _DEFINED)])
  for part in parts:
    found = [_joined(one, other) for one in found for other in part]
  groups = _listed(mapping.get('parameter_groups'))
  for group in groups:
    _check_mapping(group, 'parameter_groups has groups, which')
  # A group of parameters wins over what is around it.
  inner = [flat for group in groups for flat in _expanded(
      group, named, inside)] or [{}]
  return [{**one, **other} for one in found for other in inner]


def _joined(one, other):
  """Both mappings; ValueError for a flag of which they say different things."""
  for flag in one.keys() & other.keys():
    if one[flag] != other[flag]:
      raise ValueError(f'named groups: {flag} is {one[flag]} and {other[flag]}')
  return {**one, **other}


def _product(flat):
  """Every combination of the values of a mapping without groups."""
  when = {flag: value for flag, value in flat.items()
          if isinstance(value, dict) and 'conditions' in value}
  plain = {flag: _values(flag, value) for flag, value in flat.items()
           if flag not in when}
  if math.prod(map(len, plain.values())) > MOST:
    raise ValueError(f'makes more than {MOST:,} runs')
  for values in itertools.product(*plain.values()):
    found = [dict(zip(plain, values))]
    for flag, value in when.items():  # One may depend on those before it.
      holds = _condition(flag, value)
      found = [more for given in found for more in (
          [{**given, flag: one} for one in _listed(value['options'])]
          if holds(given) else [given])]
    yield from found


def _condition(flag, value):
  """Whether a dict of flags meets the conditions of a flag, as a function."""
  if set(value) != {'conditions', 'options'}:
    raise ValueError(f'{flag} needs conditions and options, and has '
                     + ', '.join(map(str, value)))
  conditions = _listed(value['conditions'])
  if all(isinstance(c, dict) for c in conditions):  # Any of them, all of each.
    cases = [list(c.items()) for c in conditions]
  else:
    cases = [conditions]
  if not all(isinstance(pair, list | tuple) and len(pair) == 2
             for case in cases for pair in case):
    raise ValueError(f'{flag}: conditions must be pairs of a flag and its '
                     f'value, not {value["conditions"]!r:.60}')
  return lambda given: any(
      all(given.get(name) == wanted for name, wanted in case)
      for case in cases)


def _values(flag, value):
  """The values that a flag takes: a list, those of a range, or a single one."""
  if not isinstance(value, dict):
    return value if isinstance(value, list) else [value]
  if set(value) != {'range'}:
    raise ValueError(f'{flag} has {", ".join(map(str, value))}: a mapping has '
                     'range, or conditions and options')
  ends = value['range'] if isinstance(value['range'], dict) else {}
  if not {'start', 'end'} <= set(ends) <= {'start', 'end', 'step'} or not all(
      isinstance(n, int | float) and not isinstance(n, bool) and
      math.isfinite(n) for n in ends.values()):
    raise ValueError(f'{flag}: a range has start, end and step, numbers, not '
                     f'{value["range"]!r:.60}')
  start, end = ends['start'], ends['end']
  step = ends.get('step', 1 if isinstance(start, int) else 0.1)
  count = round((end - start) / step, 6) + 1 if step > 0 else 0
  if not 1 <= count <= MOST:
    raise ValueError(f'{flag}: a range from {start} to {end} by {step} has no '
                     f'value, or more than {MOST:,}')
  # What binary fractions add is of no use in a name: 0.30000000000000004.
  return [x if isinstance(x, int) else float(f'{x:.12g}') for x in (
      start + i * step for i in range(int(count)))]


def _translated(given, unknown):
  """The same flags as they are called here.

  Args:
    given: {flag: value} as the file has them.
    unknown: a dict whose keys are the flags that do not exist here; added to.
  """
  found, lists = {}, {}
  for flag, value in given.items():
    name, values = _RENAMED.get(flag, (flag, {}))
    of_layers = name.removesuffix(_PER_LAYER)
    if name in _fields():
      text = _text(value)
      found[name] = options.convert(_fields()[name], values.get(text, text))
    elif of_layers != name and of_layers in ('n_head', *_attention()):
      lists[of_layers] = [_text(one) for one in _listed(value)]
    else:
      unknown[flag] = None
  if lists:
    entries = found.pop('attention_list', None) or (
        found.pop('attention_variant', 'causal'),)
    length = math.lcm(len(entries), *map(len, lists.values()))
    if not length:
      raise ValueError(f'{", ".join(lists)}: a list of layers is empty')
    found['attention_list'] = tuple(
        f'{entries[i % len(entries)]}('
        + ', '.join(f'{flag}={values[i % len(values)]}'
                    for flag, values in lists.items()) + ')'
        for i in range(length))
  return found


@functools.cache
def _fields():
  return default.fields()


@functools.cache
def _attention():
  return {flag for name in attention.names() for flag in attention.flags(name)}


def _text(value):
  """A value as it would be written on a command line."""
  if isinstance(value, bool):
    return str(value).lower()
  return ','.join(map(_text, value)) if isinstance(value, list) else str(value)
