"""--match: giving all runs of a sweep as much of something as the first has.

By one free flag of each. Known from shapes alone: no array is made.
"""

import dataclasses
import functools
import itertools
import json
import math

import attention
from configs import default
from train_lib import budget
from train_lib.state import AbstractModel

# How much of it an AbstractModel has, and what that is called.
MEASURES = {
    'params': (AbstractModel.n_params, 'parameters'),
    'flops': (AbstractModel.flops_per_token, 'training FLOPs a token'),
    'state': (AbstractModel.state_bytes, 'bytes of decode state')}

INT_MAX = 2 ** 31 - 1  # Of a flag.
TRIES = 256  # Values in a row that no model has, until there is none.

# With these a dataset says which ids there are and how long a row is.
_DATA = (*default.Data.__dataclass_fields__, 'block_size', 'vocab_size')


def matched(points, what):
  """The points, each with as much of something as the first has.

  Prints which flag does it, and how far it is from that.

  Args:
    points: a list of grid.Points.
    what: of MEASURES; 'none' leaves the points as they are.

  Raises:
    ValueError: one line on a run that sets mlp_width itself, has more without
      any mlp, or has a state that no single flag scales.
  """
  if what == 'none':
    return points
  amount, unit = MEASURES[what]
  data, chosen, found, wanted = {}, {}, [], None
  for point in points:
    key = budget.shape(point.config)
    if key not in chosen:
      config = _as_trained(point, data)
      wanted = amount(AbstractModel(config)) if wanted is None else wanted
      chosen[key], told = _choice(point, config, what, wanted)
      config.update(chosen[key])
      apart = amount(AbstractModel(config)) - wanted
      share = f' ({apart / wanted:+.2%})' if wanted else ''
      print(f'{point.name}: {told}, {apart:+,.0f} {unit}{share} beside the '
            'first run')
    config = point.config.copy_and_resolve_references()
    config.update(chosen[key])
    found.append(dataclasses.replace(point, config=config))
  return found


def _as_trained(point, data):
  """The config of a point, of a row and of ids as its dataset has them.

  Args:
    point: the grid.Point.
    data: {what says so: (block_size, vocab_size)}, filled here.
  """
  config = point.config.copy_and_resolve_references()
  key = json.dumps([config.to_dict()[flag] for flag in _DATA])
  if key not in data:
    resolved = budget.opened(point).config
    data[key] = resolved.block_size, resolved.vocab_size
  config.block_size, config.vocab_size = data[key]
  return config


def _choice(point, config, what, wanted):
  """What brings a point closest to what is wanted.

  Args:
    point: the grid.Point.
    config: its config, of _as_trained.
    what: of MEASURES.
    wanted: how much of it.

  Returns:
    ({flag: value}, what is to be said of it).
  """
  if what != 'state':
    if 'mlp_width' in point.given:
      raise ValueError(f'--match={what} chooses mlp_width, but run {point.name}'
                       ' sets it: leave one of them out')
    width = mlp_width(config, wanted, point.name, what=what)
    return {'mlp_width': width}, f'mlp_width={width}'
  if AbstractModel(config).state_bytes() == wanted:
    return {}, 'as it is'
  layers = attention.listed(config)
  variant, *others = dict.fromkeys(layer.variant for layer in layers)
  if others:
    raise ValueError(
        f'--match=state: run {point.name} has layers of {variant} and of '
        f'{others[0]}, whose states no single flag scales: leave it out, or '
        'give --match=params or --match=flops')
  flag = attention.state_flag(variant)
  if flag is None:
    return {}, f'{variant} has no flag that scales its state'
  if flag in point.given or any(flag in dict(layer.flags) for layer in layers):
    return {}, f'sets {flag} itself'
  amount = _amounts(config, flag, what)
  most = {'width': INT_MAX, 'tokens': config.block_size}[
      attention.flags(variant)[flag].metadata['scales_state']]
  value = nearest(amount, wanted, most=most)
  if value is None:
    return {}, f'{flag} does not change its state'
  # What it has may be more than any number: no window.
  value = min(config[flag], value, key=lambda v: abs(amount(v) - wanted))
  return {flag: value}, f'{flag}={"none" if value is None else value}'


def mlp_width(config, wanted, name='the model', *, what='params'):
  """The width of the mlp that brings a model closest to what is wanted.

  Args:
    config: of the model, with the vocab_size that it has.
    wanted: how much of it.
    name: of the model, for the error.
    what: of MEASURES.

  Raises:
    ValueError: it has more with the narrowest mlp.
  """
  amount = _amounts(config, 'mlp_width', what)
  if amount(1) > wanted:
    raise ValueError(
        f'--match={what}: {name} has more than {wanted:,.0f} '
        f'{MEASURES[what][1]} with the narrowest mlp: give the first run more '
        'of them')
  return nearest(amount, wanted)


def _amounts(config, flag, what):
  """A function from the value of a flag to how much the model then has."""
  return functools.cache(
      lambda value: MEASURES[what][0](_with(config, flag, value)))


def _with(config, flag, value):
  config = config.copy_and_resolve_references()
  config[flag] = value
  return AbstractModel(config)


def nearest(amount, wanted, *, most=INT_MAX):
  """The integer from 1 to `most` that has nearly as much as is wanted.

  Args:
    amount: a function of it that grows evenly; ValueError for one that cannot
      be, as a width that the heads do not divide.
    wanted: a value of the function.
    most: the largest that may be.

  Returns:
    None where the amount is the same whatever the integer.
  """
  def first(values):
    """The first of them that can be, or None."""
    for value in itertools.islice(values, TRIES):
      try:
        amount(value)
        return value
      except ValueError:
        continue
    return None

  one = first(range(1, most + 1))
  two = one and first(range(one + 1, most + 1))
  if not two or amount(two) == amount(one):
    return None
  slope = (amount(two) - amount(one)) / (two - one)
  there = math.floor(one + (wanted - amount(one)) / slope)
  there = min(max(there, one), most)
  near = first(range(there, 0, -1)), first(range(there + 1, most + 1))
  return min((value for value in near if value),
             key=lambda value: abs(amount(value) - wanted))
