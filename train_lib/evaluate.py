"""Validation losses: a quick one on fixed windows, and the whole split."""

import collections
import math

import jax
import numpy as np

from model.sharding import mesh_size
from train_lib import cpu, loss, sharding
from train_lib.tasks import dataset as task_data

QUEUED = 8  # batches on their way to the devices


def names(dataset):
  """Of the columns that `Evaluator.columns` gives for a dataset."""
  if not isinstance(dataset, task_data.Dataset):
    return ['val_loss']
  marks = ['', *(f'[{entry}]' for entry in dataset.slices)]
  return [f'{name}{mark}' for mark in marks
          for name in ('val_loss', 'val_accuracy')]


class Evaluator:
  """The validation losses of a run's model, compiled once for all of them.

  Args:
    run: the Run.

  Attributes:
    sums: jitted (params, batch) -> (sum of the losses, how many targets were
      the likeliest token, number of targets).
  """

  def __init__(self, run):
    self.config, self.mesh, self.model = run.config, run.mesh, run.model
    self.dataset = run.dataset
    self.batch_size = self.config.eval_batch_size or self.config.batch_size
    self.sums = jax.jit(self._sums, compiler_options=cpu.compiler_options(
        self.mesh.devices.flat[0]))

  def quick(self, params):
    """Mean loss in nats a token over eval_iters fixed batches."""
    return self._mean(
        params, self.dataset.eval_batch, self.config.eval_iters)[0]

  def columns(self, params):
    """{column: value} of a quick evaluation, as metrics.jsonl has them.

    'val_loss'; of a task also 'val_accuracy', and both of every slice.
    """
    if not isinstance(self.dataset, task_data.Dataset):
      return {'val_loss': self.quick(params)}
    columns = {}
    for mark, dataset in self._parts():
      found = self._mean(params, dataset.eval_batch, self.config.eval_iters,
                         block_size=dataset.task.context)
      columns |= {f'val_loss{mark}': found[0], f'val_accuracy{mark}': found[1]}
    return columns

  def _parts(self):
    """(what its columns end with, Dataset) of the task and its slices."""
    return [('', self.dataset), *((f'[{entry}]', self.dataset.slice(entry))
                                  for entry in self.dataset.slices)]

  def full(self, params):
    """The loss over every token of the validation split.

    Returns:
      {'val_loss_full': nats a token, 'bits_per_byte': where the number of
      bytes is known, 'val_tokens': how many, 'lost_characters': where the
      tokenizer loses some, which then cost no bits}; of a task also
      'val_accuracy_full', and both of every slice, NAME[SLICE].
    """
    dataset = self.dataset
    if isinstance(dataset, task_data.Dataset):
      return self._full_task(params)
    mean, _, tokens = self._whole(params, dataset, self.config.block_size)
    result = {'val_loss_full': mean, 'val_tokens': tokens}
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
      mean, accuracy, labels = self._whole(
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
    total, _, count = jax.device_get(self.sums(params, batch))
    return float(total / max(count, 1))

  def _sums(self, params, batch):
    inputs, targets, ids = loss.targets_of(batch)
    module = self.model.merge(params)
    hidden, _ = module.hidden(inputs, segment_ids=ids, mesh=self.mesh)
    sums = loss.cross_entropy(
        module, loss.at_targets(hidden, batch), targets,
        shards=mesh_size(self.mesh, 'B'))
    return sums.plain, sums.correct, sums.number

  def _mean(self, params, batch_of, count, *, block_size=None):
    """(mean loss, accuracy, number of targets) over batches.

    So many are queued that devices never wait, and no more: a signal is
    noticed between two of them.
    """
    batch = lambda index: sharding.global_batch(
        lambda rows: batch_of(
            index=index, rows=rows, batch_size=self.batch_size,
            block_size=block_size or self.config.block_size),
        self.batch_size, self.mesh)
    sums, queued = np.zeros(3), collections.deque()
    for index in range(count):
      queued.append(self.sums(params, batch(index)))
      if len(queued) > QUEUED:
        sums += jax.device_get(queued.popleft())
    for found in queued:
      sums += jax.device_get(found)
    mean, accuracy = sums[:2] / max(sums[2], 1)
    return float(mean), float(accuracy), int(sums[2])
