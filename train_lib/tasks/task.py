"""What a task is: options, rows with labels, chance, and when it is solved."""

import dataclasses

from attention.common.options import Flags, option
from attention.common.specs import value_text


@dataclasses.dataclass(frozen=True)
class Task(Flags):
  """Base of the tasks; each adds its options and what is not implemented here.

  Attributes:
    solved: the accuracy from which the task counts as solved.
  """
  rows: int | None = option(
      None, 'rows of a fixed training set; none: fresh ones every step',
      at_least=1)

  solved = 0.99

  @property
  def vocab_size(self):
    """Token ids, of inputs and labels; by default the option vocab."""
    return self.vocab

  @property
  def context(self):
    """T, the tokens of the longest row; by default the option length."""
    return self.length

  @property
  def labels(self):
    """P, the labels of a row at most."""
    return 1

  @property
  def chance(self):
    """The accuracy of a uniform guess among the answers that there are."""
    raise NotImplementedError

  def row(self, random):
    """One row of a randomness.Random.

    Returns:
      (tokens, at most T, places of labels, at most P, the label of each):
      the label at place p is what is wanted after token p was read.
    """
    raise NotImplementedError

  def show(self, ids):
    """Tokens as people read them."""
    return ' '.join(map(str, ids))

  def __str__(self):
    name = type(self).__module__.rpartition('.')[2]
    own = ', '.join(f'{field.name}={value_text(getattr(self, field.name))}'
                    for field in dataclasses.fields(self)
                    if getattr(self, field.name) != field.default)
    return f'{name}({own})' if own else name


def fits(flag, value, least, why):
  """ValueError if an option of a task is too small for its other ones."""
  if value < least:
    raise ValueError(f'{flag} ({value}) must be at least {least}: {why}')
