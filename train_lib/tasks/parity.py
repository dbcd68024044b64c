"""Parity: whether the ones of a row of bits are odd in number.

Wanted after the last bit. Rows have any length from `shortest` to `length`
(Grazzi et al. 2024, Unlocking State-Tracking: 3 to 40, tested on 40 to 256).
"""

import dataclasses

from attention.common.options import option
from train_lib.tasks import task


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(40, 'bits of the longest rows', at_least=1)
  shortest: int = option(3, 'bits of the shortest rows', at_least=1)

  def __post_init__(self):
    super().__post_init__()
    task.fits('length', self.length, self.shortest, 'shortest')

  @property
  def vocab_size(self):
    return 2

  @property
  def chance(self):
    return 1 / 2

  def row(self, random):
    length = self.shortest + random.below(self.length - self.shortest + 1)
    bits = random.below(2, length)
    return bits, [length - 1], [bits.sum() % 2]
