"""Rows of a task, made where they are used: (seed, step, row) -> a row."""

import hashlib

import numpy as np

from train_lib import tasks
from train_lib import tokenizer as tokenizer_lib
from train_lib.tasks.randomness import TRAINING, VALIDATION, Random

ROWS = 1000  # of the whole validation split, at least.


class Dataset:
  """A task in the place of a corpus.Dataset.

  A batch is {'tokens': int32 [rows,T], -1 where a row has ended, 'places':
  int32 [rows,P] of the labels, 'targets': int32 [rows,P], -1 where there is
  none}. Validation rows are the same for every seed.

  Args:
    task: the Task.
    slices: entries of --eval_slices.

  Attributes:
    slices: {entry: its Task}.
  """

  def __init__(self, task, *, slices=()):
    self.notes = []
    self.slices = tasks.slices(task, slices)
    self.task, self.name = task, f'task:{task}'
    self.tokenizer = tokenizer_lib.Ids(task.vocab_size)
    self.vocab_size = task.vocab_size
    self.sha256 = hashlib.sha256(repr(task).encode()).hexdigest()

  def slice(self, entry):
    """The Dataset of a slice."""
    return Dataset(self.slices[entry])

  def note_block_size(self, given, *, default):
    """Tells of a block_size that is not the rows'."""
    context = self.task.context
    if given not in (default, context):
      self.notes.append(f'block_size is {context}, the tokens of a row of the '
                        f'task, and not {given}')

  def train_batch(self, *, step, rows, batch_size, block_size, seed):
    """Rows of the global batch of one step, on any number of processes."""
    numbers, fixed = np.arange(batch_size)[rows], self.task.rows
    place = lambda row: dict(
        seed=seed, step=step, row=int(row), split=TRAINING)
    if fixed is None:
      return self._rows([place(row) for row in numbers], block_size)
    # Which rows of the set these are is drawn with a split of its own.
    drawn = [Random(**{**place(row), 'split': 2}).below(fixed)
             for row in numbers]
    return self._rows([{**place(row), 'step': 0} for row in drawn], block_size)

  def eval_batch(self, *, index, rows, batch_size, block_size):
    """Rows of validation batch `index`, fixed."""
    numbers = np.arange(index * batch_size, (index + 1) * batch_size)[rows]
    return self._rows(
        [dict(seed=0, step=0, row=int(row), split=VALIDATION)
         for row in numbers], block_size)

  full_batch = eval_batch

  def full_batches(self, *, batch_size, block_size):
    """How many full_batch there are: those of ROWS rows."""
    return -(-ROWS // batch_size)

  def _rows(self, places, block_size):
    assert block_size == self.task.context
    shape = len(places), self.task.labels
    batch = {'tokens': np.full((len(places), block_size), -1, np.int32),
             'places': np.zeros(shape, np.int32),
             'targets': np.full(shape, -1, np.int32)}
    for i, place in enumerate(places):
      for name, values in zip(batch, self.task.row(Random(**place))):
        batch[name][i, :len(values)] = values
    return batch
