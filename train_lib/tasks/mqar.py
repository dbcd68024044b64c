"""Multi-query associative recall (Arora et al. 2023, Zoology).

Pairs of a key and a value; later each key comes again, and its value is wanted.
The gaps before it follow a power law; random tokens fill the rest.
https://github.com/HazyResearch/zoology, data/multiquery_ar.py.
"""

import dataclasses

import numpy as np

from attention.common.options import option
from train_lib.tasks import task


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(64, 'tokens of a row', at_least=4)
  pairs: int = option(8, 'pairs of a key and its value', at_least=1)
  vocab: int = option(
      256, 'tokens; keys are the lower half without 0, values the upper half',
      at_least=4)
  power: float = option(
      0.01, 'gap g has the chance g^(power - 1): less is nearer', above=0,
      at_most=1)

  def __post_init__(self):
    super().__post_init__()
    task.fits('length', self.length, 4 * self.pairs,
              f'{self.pairs} pairs, and a place for each to come again')
    task.fits('vocab', self.vocab, 2 * self.pairs + 2,
              f'{self.pairs} keys that differ')

  @property
  def labels(self):
    return self.pairs

  @property
  def chance(self):
    return 1 / (self.vocab - self.vocab // 2)

  def row(self, random):
    half, pairs = self.vocab // 2, self.pairs
    keys = 1 + random.distinct(half - 1, pairs)
    values = half + random.distinct(self.vocab - half, pairs)
    space = (self.length - 2 * pairs) // 2
    gaps = random.distinct(
        space, pairs, weights=np.arange(1, space + 1) ** (self.power - 1))
    tokens = random.below(self.vocab, self.length)
    tokens[:2 * pairs:2], tokens[1:2 * pairs:2] = keys, values
    order = np.argsort(gaps)
    places = 2 * pairs + 2 * gaps[order]
    tokens[places] = keys[order]
    return tokens, places, values[order]
