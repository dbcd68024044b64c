"""Every generator against a slow statement of its task."""

import collections

import numpy as np
import pytest

from tests.train_lib.tasks import statements
from train_lib import tasks
from train_lib.tasks.dataset import Dataset

ROWS = 200
NAMES = [*tasks.names(), 'brackets']
# Of all tokens of a batch of each.
SUMS = {
    'copy': 3515, 'induction': 2592, 'modular': 5603, 'mqar': 116521,
    'needle': 1657124, 'noisy_recall': 24539, 'parity': -256, 's5': 70070,
    'selective_copy': 3568, 'brackets': 18046}


def small(name):
  """A small task of this name."""
  if name == 'brackets':
    return tasks.parse('task:modular(length=30, shortest=2, brackets)')
  return tasks.parse(f'task:{name}({statements.OPTIONS[name]})')


def batch_of(task, *, rows=ROWS):
  return Dataset(task).train_batch(
      step=3, rows=slice(None), batch_size=rows, block_size=task.context,
      seed=7)


def rows_of(task):
  """(tokens, {place: label}) of every row of a batch."""
  batch = batch_of(task)
  assert batch['tokens'].shape == (ROWS, task.context)
  assert batch['places'].shape == batch['targets'].shape == (ROWS, task.labels)
  for tokens, places, targets in zip(*batch.values()):
    tokens, valid = tokens.tolist(), targets >= 0
    used = [token for token in tokens if token >= 0]
    # A row that has ended does not go on.
    assert tokens == used + [-1] * (len(tokens) - len(used))
    found = dict(zip(places[valid].tolist(), targets[valid].tolist()))
    assert len(found) == valid.sum()
    yield used, found


@pytest.mark.parametrize('name', NAMES)
def test_labels_are_those_of_the_statement(name):
  task = small(name)
  state = getattr(statements, 'modular' if name == 'brackets' else name)
  for tokens, found in rows_of(task):
    if name == 'mqar':
      _, value = state(task, tokens)
      assert len(found) == task.pairs
      assert sorted(value) == sorted(tokens[place] for place in found)
      assert all(label == value[tokens[place]] and place >= 2 * task.pairs
                 for place, label in found.items())
    else:
      assert found == state(task, tokens)


@pytest.mark.parametrize('name', NAMES)
def test_tokens_and_answers_fill_the_vocabulary_and_no_more(name):
  task, answers = small(name), collections.Counter()
  for tokens, found in rows_of(task):
    answers.update(found.values())
    assert max(tokens) < task.vocab_size
  assert max(answers) < task.vocab_size
  # Chance: as many answers as there are, nearly as often.
  assert task.chance == pytest.approx(1 / len(answers))
  if name not in ('modular', 'brackets', 's5'):  # Products have more zeros.
    share = np.array([*answers.values()]) / answers.total()
    noise = (task.chance / answers.total()) ** 0.5
    assert np.abs(share - task.chance).max() < 6 * noise


def test_gaps_of_mqar_follow_the_power_law():
  task = tasks.parse('task:mqar(pairs=1, length=22, power=0.1)')
  gaps = (batch_of(task, rows=4000)['places'][:, 0] - 2) // 2
  weights = np.arange(1, 11) ** -0.9
  np.testing.assert_allclose(np.bincount(gaps, minlength=10) / 4000,
                             weights / weights.sum(), atol=0.03)


def test_lengths_are_uniform():
  task = small('parity')
  lengths = (batch_of(task, rows=4000)['tokens'] >= 0).sum(1)
  counts = np.bincount(lengths)
  assert counts[:2].sum() == 0
  np.testing.assert_allclose(counts[2:] / 4000, 1 / 8, atol=0.025)


def test_the_rows_never_change():
  """If this fails, runs that resume no longer see the data they would have."""
  sums = {name: int(batch_of(small(name))['tokens'].sum()) for name in NAMES}
  assert sums == SUMS
