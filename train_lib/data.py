"""A sampler without state: (seed, step, row) -> tokens of a corpus.Dataset."""

import os

import numpy as np


def train_batch(dataset, *, step, rows, batch_size, block_size, seed):
  """Rows of the global batch of one step, the same on any number of processes.

  Args:
    rows: slice or range of the batch_size rows of the global batch.
    block_size: T; a row has one token more, as inputs and targets overlap.

  Returns:
    {'tokens': int32 [rows, T + 1]}, with packing also 'segment_ids', alike:
    1, 2, ... by document within the row. The target of a document's last
    token is of the next document: where the ids differ, a loss leaves it out.

  Raises:
    ValueError: the training split is too short, or seed is negative.
  """
  if seed < 0:
    raise ValueError(f'--seed={seed} is negative: use 0 or more')
  n = _places(dataset.train, block_size, split='training')
  # Raw bits are the same in every NumPy, which Generator does not promise.
  bits = np.random.Philox(key=seed, counter=[0, 0, 0, step]).random_raw(
      batch_size)
  offsets = (bits % np.uint64(n)).astype(np.int64)
  return _windows(dataset.train, dataset.train_starts, offsets=offsets[rows],
                  block_size=block_size)


def eval_batch(dataset, *, index, rows, batch_size, block_size):
  """Rows of validation batch `index`, fixed; otherwise like train_batch.

  Row i of all batches starts at the fractional part of i times the golden
  ratio, so that any number of batches lies evenly over the split.
  """
  n = _places(dataset.val, block_size, split='validation')
  i = np.arange(index * batch_size, (index + 1) * batch_size, dtype=np.uint64)
  turns = (i * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) * 2.0 ** -32
  offsets = (turns * n).astype(np.int64)
  return _windows(dataset.val, dataset.val_starts, offsets=offsets[rows],
                  block_size=block_size)


def full_batches(dataset, *, batch_size, block_size):
  """How many full_batch there are."""
  targets = _places(dataset.val, 1, split='validation')
  return -(-targets // (batch_size * block_size))


def full_batch(dataset, *, index, rows, batch_size, block_size):
  """Rows of batch `index` of the whole validation split; like eval_batch.

  Every token but the first, which has no context, is a target exactly once.
  What is over at the end is token -1, which a loss must ignore, of segment 0.
  """
  last = _places(dataset.val, 1, split='validation')
  _check_whole(dataset.val)
  first = np.arange(index * batch_size, (index + 1) * batch_size) * block_size
  first = first[rows]
  places = first[:, None] + np.arange(block_size + 1)
  inside = (places <= last) & (first < last)[:, None]
  places = np.minimum(places, last)
  batch = {'tokens': np.where(inside, dataset.val[places].astype(np.int32), -1)}
  if dataset.val_starts is not None:
    batch['segment_ids'] = np.where(
        inside, _segment_ids(dataset.val_starts, places), np.int32(0))
  return batch


def _places(tokens, block_size, *, split):
  """How many windows of block_size + 1 tokens there are."""
  n = len(tokens) - block_size
  if n < 1:
    raise ValueError(
        f'the {split} split has {len(tokens)} tokens, fewer than block_size + '
        f'1 = {block_size + 1}: change --block_size, --val_fraction, --dataset')
  return n


def _check_whole(tokens):
  """Raises ValueError if a mapped file was cut: reading on would kill."""
  if not isinstance(tokens, np.memmap):
    return
  size = os.stat(tokens.filename).st_size
  if size < tokens.nbytes:
    raise ValueError(
        f'{tokens.filename} had {tokens.nbytes} bytes and has {size}: it was '
        'cut while it was read; restore it, and start again')


def _windows(tokens, starts, *, offsets, block_size):
  _check_whole(tokens)
  # One strided view of all windows is five times as fast as an index a token.
  windows = np.ndarray(
      (len(tokens) - block_size, block_size + 1), tokens.dtype, tokens,
      strides=tokens.strides * 2)
  batch = {'tokens': windows[offsets].astype(np.int32)}
  if starts is not None:
    places = offsets[:, None] + np.arange(block_size + 1)
    batch['segment_ids'] = _segment_ids(starts, places)
  return batch


def _segment_ids(starts, places):
  document = np.searchsorted(starts, places, side='right')
  return (document - document[:, :1] + 1).astype(np.int32)
