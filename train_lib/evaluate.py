"""Validation losses: a quick one on fixed windows, and the whole split."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np

from model.sharding import mesh_size
from train_lib import cpu, loss, sharding
from train_lib.tasks import dataset as task_data
from train_lib.text_slices import TextSlices

QUEUED = 8  # batches on their way to the devices


def names(dataset, config):
  """Of the columns that `Evaluator.columns` gives for a dataset."""
  if not isinstance(dataset, task_data.Dataset):
    slices = TextSlices(config.eval_slices, config.block_size)
    return [f'val_loss{mark}' for mark in _marks(slices.labels)]
  return [f'{name}{mark}' for mark in _marks(dataset.slices)
          for name in ('val_loss', 'val_accuracy')]


def _marks(slices):
  """What the columns of the whole, and of each slice, end with."""
  return ['', *(f'[{name}]' for name in slices)]


class Evaluator:
  """The validation losses of a run's model, compiled once for all of them.

  Args:
    run: the Run.

  Attributes:
    sums: jitted (params, batch) -> (sum of the losses, how many targets were
      the likeliest token, number of targets), each [1] or, with slices of text,
      [1+slices].
  """

  def __init__(self, run):
    self.config, self.mesh, self.model = run.config, run.mesh, run.model
    self.dataset = run.dataset
    self.slices = TextSlices(
        None if isinstance(self.dataset, task_data.Dataset)
        else self.config.eval_slices, self.config.block_size)
    self.batch_size = self.config.eval_batch_size or self.config.batch_size
    self.sums = jax.jit(self._sums, compiler_options=cpu.compiler_options(
        self.mesh.devices.flat[0]))

  def columns(self, params):
    """{column: mean over eval_iters fixed batches}, as metrics.jsonl has them.

    'val_loss', also of every slice that has targets; of a task 'val_accuracy'
    too.
    """
    if not isinstance(self.dataset, task_data.Dataset):
      return self._losses('val_loss', self._mean(
          params, self.dataset.eval_batch, self.config.eval_iters))
    columns = {}
    for mark, dataset in self._parts():
      found = self._mean(params, dataset.eval_batch, self.config.eval_iters,
                         block_size=dataset.task.context)
      columns |= {f'val_loss{mark}': found[0][0],
                  f'val_accuracy{mark}': found[1][0]}
    return columns

  def _losses(self, name, found):
    """{column: mean} of the whole and of every slice of text."""
    means, _, numbers = found
    return {f'{name}{mark}': mean for mark, mean, number in zip(
        _marks(self.slices.labels), means, numbers, strict=True)
            if number or not mark}

  def _parts(self):
    """(what its columns end with, Dataset) of the task and its slices."""
    slices = self.dataset.slices
    return list(zip(_marks(slices), [
        self.dataset, *map(self.dataset.slice, slices)], strict=True))

  def full(self, params):
    """The loss over every token of the validation split.

    Returns:
      {'val_loss_full': nats a token, 'bits_per_byte': where the number of
      bytes is known, 'val_tokens': how many, 'lost_characters': where the
      tokenizer loses some, which then cost no bits}; the loss of every slice,
      NAME[SLICE]; of a task also 'val_accuracy_full', likewise.
    """
    dataset = self.dataset
    if isinstance(dataset, task_data.Dataset):
      return self._full_task(params)
    found = self._whole(params, dataset, self.config.block_size)
    mean = found[0][0]
    result = {**self._losses('val_loss_full', found),
              'val_tokens': found[2][0]}
    if dataset.val_bytes:
      # As if the first token, never a target, had the mean loss.
      result['bits_per_byte'] = (
          mean * len(dataset.val) / dataset.val_bytes / math.log(2))
    if dataset.lost:
      result['lost_characters'] = dataset.lost
    return result

  def _full_task(self, params):
    """As `full`, of a task and its slices."""
    result = {}
    for mark, dataset in self._parts():
      (mean,), (accuracy,), (labels,) = self._whole(
          params, dataset, dataset.task.context)
      result |= {f'val_loss_full{mark}': mean,
                 f'val_accuracy_full{mark}': accuracy}
      result.setdefault('val_tokens', labels)
    return result

  def _whole(self, params, dataset, block_size):
    count = dataset.full_batches(
        batch_size=self.batch_size, block_size=block_size)
    return self._mean(params, dataset.full_batch, count, block_size=block_size)

  def loss(self, params, batch):
    """Mean loss of a batch like those that it was compiled for."""
    (total, *_), _, (count, *_) = jax.device_get(self.sums(params, batch))
    return float(total / max(count, 1))

  def _sums(self, params, batch):
    inputs, targets, ids = loss.targets_of(batch)
    module = self.model.merge(params)
    hidden, _ = module.hidden(inputs, segment_ids=ids, mesh=self.mesh)
    sums = loss.cross_entropy(
        module, loss.at_targets(hidden, batch), targets,
        masks=batch.get('masks'), shards=mesh_size(self.mesh, 'B'))
    return jax.tree.map(
        jnp.atleast_1d, (sums.plain, sums.correct, sums.number))

  def _mean(self, params, batch_of, count, *, block_size=None):
    """([mean loss], [accuracy], [number of targets]) over batches.

    Of all targets, and then of those of each slice of text.

    So many are queued that devices never wait, and no more: a signal is
    noticed between two of them.
    """
    batch = lambda index: sharding.global_batch(
        lambda rows: self.slices.mark(batch_of(
            index=index, rows=rows, batch_size=self.batch_size,
            block_size=block_size or self.config.block_size)),
        self.batch_size, self.mesh)
    sums = np.zeros((3, 1 + len(self.slices.labels)))
    queued = collections.deque()
    for index in range(count):
      queued.append(self.sums(params, batch(index)))
      if len(queued) > QUEUED:
        sums += jax.device_get(queued.popleft())
    for found in queued:
      sums += jax.device_get(found)
    means, accuracies = (sums[:2] / np.maximum(sums[2], 1)).tolist()
    return means, accuracies, sums[2].astype(int).tolist()
