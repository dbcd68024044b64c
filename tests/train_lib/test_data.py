"""The sampler: which tokens a batch has, whoever makes it."""

import dataclasses
import functools

import numpy as np
import pytest

from train_lib import corpus, data
from train_lib import tokenizer as tokenizer_lib

ALL = slice(None)
SHAPE = dict(batch_size=8, block_size=16)


def numbered(length, starts=None):
  """A data set whose tokens are their own places in both splits."""
  tokens = np.arange(length, dtype=np.uint16)
  starts = None if starts is None else np.array(starts)
  return corpus.Dataset(
      name='', tokenizer=tokenizer_lib.Ids(length), train=tokens, val=tokens,
      train_starts=starts, val_starts=starts, val_bytes=None, sha256='')


def test_segment_ids_follow_the_documents():
  starts, seen = [0, 301, 552], set()
  for step in range(40):
    batch = data.train_batch(numbered(1053, starts), step=step, rows=ALL,
                             seed=0, batch_size=8, block_size=300)
    tokens, ids = batch['tokens'], batch['segment_ids']
    assert tokens.dtype == ids.dtype == np.int32
    assert tokens.shape == ids.shape == (8, 301)
    assert (ids[:, 0] == 1).all()
    new = np.isin(tokens[:, 1:], starts)
    np.testing.assert_array_equal(np.diff(ids, axis=1), new)
    seen |= set(ids.ravel().tolist())
  assert seen == {1, 2, 3}


def test_tokens_are_windows_of_the_source():
  for step in range(20):
    batch = data.train_batch(
        numbered(10_000), step=step, rows=ALL, seed=1, **SHAPE)
    assert set(batch) == {'tokens'}
    assert batch['tokens'].dtype == np.int32
    assert batch['tokens'].shape == (8, 17)
    assert (np.diff(batch['tokens'], axis=1) == 1).all()


@pytest.mark.parametrize(
    'starts', [None, [0, 301, 552]], ids=['plain', 'packed'])
def test_any_split_of_the_rows_gives_the_global_batch(starts):
  dataset = numbered(1053, starts)
  for function, place in ((data.train_batch, dict(step=3, seed=7)),
                          (data.eval_batch, dict(index=2)),
                          (data.full_batch, dict(index=1))):
    call = functools.partial(function, dataset, **place, **SHAPE)
    whole = call(rows=ALL)
    for parts in ([slice(0, 3), slice(3, 8)], [range(0, 8, 2), range(1, 8, 2)],
                  [slice(i, i + 1) for i in range(8)]):
      for part in parts:
        for key, value in call(rows=part).items():
          np.testing.assert_array_equal(value, whole[key][part])


def test_batches_depend_on_seed_and_step_alone():
  draw = lambda step, seed: data.train_batch(
      numbered(10_000), step=step, rows=ALL, seed=seed, **SHAPE)['tokens']
  assert (draw(5, 1) == draw(5, 1)).all()
  different = [draw(5, 1), draw(6, 1), draw(5, 2), draw(2 ** 40, 1)]
  for i, a in enumerate(different):
    for b in different[:i]:
      assert (a != b).any()


def test_the_stream_never_changes():
  """If this fails, runs that resume no longer see the data they would have."""
  dataset, shape = numbered(10000), dict(batch_size=4, block_size=8)
  first = data.train_batch(dataset, step=3, rows=ALL, seed=1337, **shape)
  assert first['tokens'][:, 0].tolist() == [2419, 7911, 2341, 4757]
  fixed = data.eval_batch(dataset, index=0, rows=ALL, **shape)
  assert fixed['tokens'][:, 0].tolist() == [0, 6175, 2358, 8534]


def test_offsets_reach_both_ends():
  batches = [data.train_batch(numbered(10), step=step, rows=ALL, seed=0,
                              batch_size=8, block_size=7) for step in range(30)]
  starts = {int(row[0]) for batch in batches for row in batch['tokens']}
  assert starts == {0, 1, 2}


def test_eval_windows_are_even():
  starts = np.concatenate([
      data.eval_batch(numbered(4016), index=i, rows=ALL, **SHAPE)['tokens']
      for i in range(8)])[:, 0]
  counts = np.histogram(starts, bins=8, range=(0, 4000))[0]
  assert counts.min() >= 7 and counts.max() <= 9
  assert len(set(starts.tolist())) == 64


@pytest.mark.parametrize('length', [2, 17, 18, 128, 129, 130, 500])
@pytest.mark.parametrize('starts', [None, [0, 1, 60]], ids=['plain', 'packed'])
def test_full_batches_have_every_target_once(length, starts):
  dataset, targets = numbered(length, starts), []
  for index in range(data.full_batches(dataset, **SHAPE)):
    batch = data.full_batch(dataset, index=index, rows=ALL, **SHAPE)
    tokens = batch['tokens']
    assert tokens.shape == (8, 17)
    assert tokens.dtype == np.int32
    inputs, target = tokens[:, :-1], tokens[:, 1:]
    assert (inputs[target >= 0] == target[target >= 0] - 1).all()
    targets += target[target >= 0].tolist()
    if starts:
      assert ((batch['segment_ids'] == 0) == (tokens == -1)).all()
      crossing = np.diff(batch['segment_ids'], axis=1)[target >= 0]
      assert (crossing == np.isin(target[target >= 0], starts)).all()
  assert targets == list(range(1, length))
  assert (tokens[:, 1] >= 0).any()


def test_too_short():
  dataset = numbered(10_000)
  message = r'the {} split has .* block_size \+ 1 = 99999: .*--val_fraction'
  long = dict(rows=ALL, batch_size=2, block_size=99998)
  with pytest.raises(ValueError, match=message.format('training')):
    data.train_batch(dataset, step=0, seed=0, **long)
  with pytest.raises(ValueError, match=message.format('validation')):
    data.eval_batch(dataset, index=0, **long)
  with pytest.raises(ValueError, match='validation split has 0 tokens'):
    data.full_batches(
        dataclasses.replace(dataset, val=dataset.val[:0]), **SHAPE)
  with pytest.raises(ValueError, match='--seed=-1'):
    data.train_batch(dataset, step=0, rows=ALL, seed=-1, **SHAPE)
