"""--stop_when: what a run is for, and whether it has got there."""

import operator
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from train_lib import evaluate

COMPARE = {'>=': operator.ge, '<=': operator.le,
           '>': operator.gt, '<': operator.lt}
_FORM = re.compile(r'(.+?)\s*(>=|<=|>|<)\s*(\S+)')
SPENT = ('tokens', 'seconds')  # over all parts of the run


class Goal(NamedTuple):
  """A condition on a validation's columns, or on what has been spent.

  Attributes:
    text: as it was given.
    column: its name, 'val_accuracy' for accuracy; or one of SPENT.
    compare: one of COMPARE.
    value: what with.
  """
  text: str
  column: str
  compare: str
  value: float

  def reached(self, columns, sums):
    """Whether it holds now: what the first process says.

    Args:
      columns: {name: value} of a validation.
      sums: Meter.sums.
    """
    known = {**columns, 'tokens': sums['tokens'], 'seconds': sums['elapsed']}
    holds = COMPARE[self.compare](known[self.column], self.value)
    if jax.process_count() > 1 and self.column == 'seconds':  # Clocks differ.
      holds = multihost_utils.broadcast_one_to_all(np.asarray(holds))
    return bool(holds)


def parse(config, dataset):
  """The Goal of a config, or None.

  Args:
    config: the config.
    dataset: what it is trained on, whose columns these are.

  Raises:
    ValueError: it says nothing, or of something that is never measured.
  """
  text = config.stop_when
  if not text:
    return None
  if not config.eval_interval:
    raise ValueError(f"stop_when='{text}' is looked at after a validation, and "
                     'there is none: set eval_interval')
  found = _FORM.fullmatch(text.strip())
  name, compare, value = found.groups() if found else ('', '', '')
  try:
    value = float(value)
  except ValueError:
    raise ValueError(f"stop_when='{text}' is not of the form NAME > NUMBER, "
                     'with one of >, >=, <, <=') from None
  columns = evaluate.names(dataset, config)
  column = name if name in SPENT else f'val_{name.removeprefix("val_")}'
  if column not in (*SPENT, *columns):
    names = ', '.join([*(c.removeprefix('val_') for c in columns), *SPENT])
    raise ValueError(f"stop_when='{text}': {name} is not measured; what is: "
                     f'{names}')
  return Goal(text, column, compare, value)


def met(config, meta):
  """Whether a checkpoint is of a run that had got where it is to go."""
  return bool(meta and config.stop_when
              and meta.get('stopped_when') == config.stop_when)
