"""Induction heads (Gu & Dao 2023, Mamba, section 4.1.2).

Random tokens, among them once a special one; the row ends with it, and what
came after it is wanted.
"""

import dataclasses

from attention.common.options import option
from train_lib.tasks import task


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(256, 'tokens of a row', at_least=3)
  vocab: int = option(16, 'tokens, the special one included', at_least=3)

  @property
  def chance(self):
    return 1 / (self.vocab - 1)

  def row(self, random):
    special = self.vocab - 1
    tokens = random.below(special, self.length)
    place = random.below(self.length - 2)
    tokens[[place, -1]] = special
    return tokens, [self.length - 1], [tokens[place + 1]]
