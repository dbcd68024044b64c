"""Selective copying (Gu & Dao 2023, Mamba, section 4.1.1).

Some tokens at random places among blanks, then as many marks; at each mark the
next of the tokens is wanted, in order.
"""

import dataclasses

import numpy as np

from attention.common.options import option
from train_lib.tasks import task

BLANK, MARK, FIRST = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(
      256, 'tokens before the marks', at_least=1)
  copies: int = option(16, 'tokens to copy', at_least=1)
  vocab: int = option(16, 'tokens, blank and mark included', at_least=4)

  def __post_init__(self):
    super().__post_init__()
    task.fits('length', self.length, self.copies, 'copies')

  @property
  def context(self):
    return self.length + self.copies

  @property
  def labels(self):
    return self.copies

  @property
  def chance(self):
    return 1 / (self.vocab - FIRST)

  def row(self, random):
    tokens = np.full(self.context, BLANK)
    wanted = FIRST + random.below(self.vocab - FIRST, self.copies)
    tokens[np.sort(random.distinct(self.length, self.copies))] = wanted
    tokens[self.length:] = MARK
    return tokens, np.arange(self.length, self.context), wanted
