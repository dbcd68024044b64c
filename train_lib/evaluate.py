"""Validation losses: a quick one on fixed windows, and the whole split."""

import collections
import math

import jax
import numpy as np

from model.sharding import mesh_size
from train_lib import cpu, data, loss, sharding

QUEUED = 8  # batches on their way to the devices


class Evaluator:
  """The validation losses of a run's model, compiled once for all of them.

  Args:
    run: the Run.

  Attributes:
    sums: jitted (params, batch) -> (sum of the losses, number of targets).
  """

  def __init__(self, run):
    self.config, self.mesh, self.model = run.config, run.mesh, run.model
    self.dataset = run.dataset
    self.batch_size = self.config.eval_batch_size or self.config.batch_size
    self.sums = jax.jit(self._sums, compiler_options=cpu.compiler_options(
        self.mesh.devices.flat[0]))

  def quick(self, params):
    """Mean loss in nats a token over eval_iters fixed batches."""
    return self._mean(params, data.eval_batch, self.config.eval_iters)[0]

  def full(self, params):
    """The loss over every token of the validation split.

    Returns:
      {'val_loss_full': nats a token, 'bits_per_byte': where the number of
      bytes is known, 'val_tokens': how many, 'lost_characters': where the
      tokenizer loses some, which then cost no bits}.
    """
    dataset = self.dataset
    count = data.full_batches(dataset, batch_size=self.batch_size,
                              block_size=self.config.block_size)
    mean, tokens = self._mean(params, data.full_batch, count)
    result = {'val_loss_full': mean, 'val_tokens': tokens}
    if dataset.val_bytes:
      # As if the first token, never a target, had the mean loss.
      result['bits_per_byte'] = (
          mean * len(dataset.val) / dataset.val_bytes / math.log(2))
    if dataset.lost:
      result['lost_characters'] = dataset.lost
    return result

  def loss(self, params, batch):
    """Mean loss of a batch like those that it was compiled for."""
    total, count = jax.device_get(self.sums(params, batch))
    return float(total / max(count, 1))

  def _sums(self, params, batch):
    inputs, targets, ids = loss.targets_of(batch)
    module = self.model.merge(params)
    hidden, _ = module.hidden(inputs, segment_ids=ids, mesh=self.mesh)
    _, total, count = loss.cross_entropy(
        module, hidden, targets, shards=mesh_size(self.mesh, 'B'))
    return total, count

  def _mean(self, params, batch_of, count):
    """(mean loss, number of targets) over batches.

    So many are queued that devices never wait, and no more: a signal is
    noticed between two of them.
    """
    batch = lambda index: sharding.global_batch(
        lambda rows: batch_of(
            self.dataset, index=index, rows=rows, batch_size=self.batch_size,
            block_size=self.config.block_size),
        self.batch_size, self.mesh)
    sums, queued = np.zeros(2), collections.deque()
    for index in range(count):
      queued.append(self.sums(params, batch(index)))
      if len(queued) > QUEUED:
        sums += jax.device_get(queued.popleft())
    for pair in queued:
      sums += jax.device_get(pair)
    return float(sums[0] / max(sums[1], 1)), int(sums[1])
