"""--eval_slices of text: the targets that a column of an evaluation is about.

  position        by how many tokens of its document a target has before it
  repeats(n=3)    those that end n tokens which the row had before, and the rest

A mixer that recalls is told by the second: it pays for such a target only once.
"""

import dataclasses
import re

import numpy as np

from attention.common.options import nearest, option
from train_lib.tasks import with_options

_FORM = re.compile(r'(\w+)(?:\((.*)\))?')


@dataclasses.dataclass(frozen=True)
class Position:
  """Buckets, each four times as far as the one before."""

  def labels(self, block_size):
    return [f'position={low}-{high}' for low, high in self._ends(block_size)]

  def masks(self, tokens, ids):
    place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if ids is not None:
      starts = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
      place = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    return [(low <= place) & (place <= high)
            for low, high in self._ends(tokens.shape[1] - 1)]

  def _ends(self, block_size):
    low, ends = 1, []
    while low <= block_size:
      high = 16 if low == 1 else 4 * (low - 1)
      ends.append((low, min(high, block_size)))
      low = high + 1
    return ends


@dataclasses.dataclass(frozen=True)
class Repeats:
  """Targets that end n tokens in a row that its document has had before."""
  n: int = option(3, 'tokens in a row', at_least=1)

  def labels(self, block_size):
    del block_size
    return [f'repeats={self.n}', f'fresh={self.n}']

  def masks(self, tokens, ids):
    ids = np.zeros_like(tokens) if ids is None else ids
    repeats = np.stack([self._row(*row) for row in zip(tokens, ids)])
    return [repeats, ~repeats]

  def _row(self, tokens, ids):
    """bool [tokens] of one row."""
    number = lambda *columns: np.unique(
        np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1)
    token = number(ids, tokens)  # Those of two documents differ.
    gram = token
    for n in range(1, min(self.n, len(tokens))):
      gram = number(gram[:-1], token[n:])
    _, first = np.unique(gram, return_index=True)
    repeats = np.ones(len(gram), bool)
    repeats[first] = False
    return np.pad(repeats, (len(tokens) - len(gram), 0))


KINDS = {'position': Position, 'repeats': Repeats}


class TextSlices:
  """The entries of an --eval_slices, and what they make of a batch.

  Args:
    entries: the flag's.
    block_size: tokens of a row, targets that is.

  Attributes:
    labels: of the columns, in the order of the masks.

  Raises:
    ValueError: one line on an entry that is none of these.
  """

  def __init__(self, entries, block_size):
    self._kinds = [_parse(entry) for entry in entries or ()]
    self.labels = [label for kind in self._kinds
                   for label in kind.labels(block_size)]

  def mark(self, batch):
    """The batch, with 'masks': bool [rows,T,labels] of its targets."""
    if not self.labels:
      return batch
    masks = [mask for kind in self._kinds for mask in kind.masks(
        batch['tokens'], batch.get('segment_ids'))]
    return {**batch, 'masks': np.stack(masks, -1)[:, 1:]}


def _parse(entry):
  found = _FORM.fullmatch(entry.strip())
  if not found or found.group(1) not in KINDS:
    raise ValueError(f'--eval_slices={entry} is not known'
                     f'{nearest(entry, KINDS)} of text there are '
                     f'{", ".join(KINDS)}')
  return with_options(KINDS[found.group(1)](), found.group(2) or '',
                      flag=f'eval_slices={entry}')
