"""Rows depend on the seed, the step and the row alone."""

import numpy as np
import pytest

from train_lib import tasks
from train_lib.tasks.dataset import Dataset

ALL = slice(None)


def batch(dataset, *, step=0, seed=0, rows=ALL, batch_size=8):
  return dataset.train_batch(
      step=step, seed=seed, rows=rows, batch_size=batch_size,
      block_size=dataset.task.context)


@pytest.mark.parametrize('name', tasks.names())
@pytest.mark.parametrize('rows', ['none', '5'])
def test_any_split_of_the_rows_gives_the_global_batch(name, rows):
  dataset = Dataset(tasks.parse(f'task:{name}(rows={rows})'))
  whole = batch(dataset)
  for part in (slice(0, 3), slice(3, 8), range(1, 8, 2)):
    for key, value in batch(dataset, rows=part).items():
      np.testing.assert_array_equal(value, whole[key][part])
  fixed = lambda rows: dataset.eval_batch(
      index=1, rows=rows, batch_size=8, block_size=dataset.task.context)
  np.testing.assert_array_equal(
      fixed(slice(2, 5))['tokens'], fixed(ALL)['tokens'][2:5])


def test_other_seeds_steps_rows_and_splits_are_other_rows():
  dataset = Dataset(tasks.parse('task:copy'))
  batches = [batch(dataset, step=step, seed=seed)['tokens']
             for step in (0, 1, 2 ** 40) for seed in (0, 1)]
  batches.append(dataset.eval_batch(
      index=0, rows=ALL, batch_size=8, block_size=64)['tokens'])
  every = np.concatenate(batches)
  assert len(np.unique(every, axis=0)) == len(every)


def test_a_fixed_training_set_has_so_many_rows():
  dataset = Dataset(tasks.parse('task:copy(rows=20)'))
  seen = np.concatenate([batch(dataset, step=s)['tokens'] for s in range(40)])
  assert len(np.unique(seen, axis=0)) == 20


def test_the_name_is_the_task():
  task = tasks.parse('task:mqar( pairs=8,length=128, vocab=256 )')
  assert str(task) == 'mqar(length=128)'
  assert tasks.parse(f'task:{task}') == task
  assert Dataset(task).sha256 != Dataset(tasks.parse('task:mqar')).sha256


@pytest.mark.parametrize('text, told', {
    'task:mqra': 'did you mean mqar?',
    'task:': 'is no task: write task:NAME',
    'task:mqar(pairs=8': 'is no task: write',
    'task:mqar(pair=8)': 'did you mean pairs?',
    'task:mqar(pairs=0)': 'pairs (0) must be at least 1',
    'task:mqar(pairs=17)': 'length (64) must be at least 68',
    'task:mqar(vocab=16)': 'vocab (16) must be at least 18',
    'task:mqar(pairs=many)': 'pairs=many is not an integer',
    'task:parity(shortest=50)': 'length (40) must be at least 50',
    'task:needle(length=32, digits=9)': 'the sentence and the question',
    'task:s5(rows=0)': 'rows (0) must be at least 1',
}.items())
def test_a_bad_task_is_one_line(text, told):
  with pytest.raises(ValueError) as error:
    tasks.parse(text)
  assert told in str(error.value) and '\n' not in str(error.value)
  assert 'dataset=' + text in str(error.value)


def test_slices_change_options_alone():
  task = tasks.parse('task:mqar(pairs=4)')
  found = tasks.slices(task, ('length=128', '(length=32, pairs=2)'))
  assert [*map(str, found.values())] == [
      'mqar(length=128, pairs=4)', 'mqar(length=32, pairs=2)']
  with pytest.raises(ValueError, match='more than the 256'):
    tasks.slices(task, ('vocab=512',))
  with pytest.raises(ValueError, match=r'eval_slices=len=1.*length'):
    tasks.slices(task, ('len=1',))
