"""The word problem of S5: products of permutations of five things.

Each token is a permutation, and at each the product of all so far is wanted
(Merrill, Petty & Sabharwal 2024, The Illusion of State).
"""

import dataclasses
import functools
import itertools

import numpy as np

from attention.common.options import option
from train_lib.tasks import task

PERMUTATIONS = tuple(itertools.permutations(range(5)))


@functools.cache
def products():
  """int64 [120, 120]: the number of the permutation `a after b` at [a, b]."""
  every = np.array(PERMUTATIONS)
  number = every @ 5 ** np.arange(5)
  both = every[:, every]  # [a, b, i] = a(b(i))
  order = np.argsort(number)
  return order[np.searchsorted(number[order], both @ 5 ** np.arange(5))]


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(16, 'permutations of a row', at_least=1)

  @property
  def vocab_size(self):
    return len(PERMUTATIONS)

  @property
  def labels(self):
    return self.length

  @property
  def chance(self):
    return 1 / len(PERMUTATIONS)

  def row(self, random):
    tokens = random.below(len(PERMUTATIONS), self.length)
    states = itertools.accumulate(
        tokens, lambda state, token: products()[token, state])
    return tokens, np.arange(self.length), [*states]
