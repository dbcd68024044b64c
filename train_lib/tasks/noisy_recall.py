"""Noisy in-context recall (Poli et al. 2024, MAD).

Keys, each followed by its value, which is the row's own; between pairs tokens
of another vocabulary. At each key that came before, its value is wanted.
"""

import dataclasses

from attention.common.options import option
from train_lib.tasks import task


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(128, 'tokens of a row', at_least=4)
  vocab: int = option(
      16, 'tokens of pairs: keys are the lower half, values the upper half',
      at_least=2)
  noise_vocab: int = option(16, 'tokens of the noise', at_least=1)
  noise: float = option(
      0.2, 'chance of a token of noise where a pair could begin', at_least=0,
      at_most=0.9)

  @property
  def vocab_size(self):
    return self.vocab + self.noise_vocab

  @property
  def labels(self):
    return self.length // 2

  @property
  def chance(self):
    return 1 / (self.vocab - self.vocab // 2)

  def row(self, random):
    half = self.vocab // 2
    values = half + random.below(self.vocab - half, half)
    # Drawn for every place: how many are used differs from row to row.
    noisy = random.uniform(self.length) < self.noise
    keys = random.below(half, self.length)
    noise = self.vocab + random.below(self.noise_vocab, self.length)
    tokens, places, seen = [], [], set()
    while (place := len(tokens)) < self.length:
      key = keys[place]
      if noisy[place] or place + 1 == self.length:
        tokens.append(noise[place])
        continue
      if key in seen:
        places.append(place)
      seen.add(key)
      tokens += [key, values[key]]
    return tokens, places, [tokens[place + 1] for place in places]
