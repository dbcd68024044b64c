"""Copying: random tokens, then as many marks; at each the next one is wanted.

The selective copying of MAD (Poli et al. 2024) without its blanks.
"""

import dataclasses

import numpy as np

from attention.common.options import option
from train_lib.tasks import task

MARK, FIRST = 0, 1


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(32, 'tokens to copy', at_least=1)
  vocab: int = option(16, 'tokens, the mark included', at_least=3)

  @property
  def context(self):
    return 2 * self.length

  @property
  def labels(self):
    return self.length

  @property
  def chance(self):
    return 1 / (self.vocab - FIRST)

  def row(self, random):
    wanted = FIRST + random.below(self.vocab - FIRST, self.length)
    tokens = np.concatenate([wanted, np.full(self.length, MARK)])
    return tokens, np.arange(self.length, self.context), wanted
