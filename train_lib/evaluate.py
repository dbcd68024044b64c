"""Validation losses: a quick one on fixed windows, and the whole split."""

import math

import jax
import numpy as np

from model.sharding import mesh_size
from train_lib import data, host, loss, sharding


def make_evaluator(run):
  """Returns a jitted (params, batch) -> (sum of losses, number of targets)."""
  shards = mesh_size(run.mesh, 'B')

  def sums(params, batch):
    model = run.skeleton.merge(params)
    inputs, targets, ids = loss.targets_of(batch)
    hidden, _ = model.hidden(inputs, segment_ids=ids, mesh=run.mesh)
    _, total, count = loss.cross_entropy(
        model, hidden, targets, shards=shards)
    return total, count
  return jax.jit(sums, compiler_options=host.compiler_options(
      run.mesh.devices.flat[0]))


def quick(run, params):
  """Mean loss in nats a token over eval_iters fixed batches."""
  config, size = run.config, _rows(run)
  make = lambda index: lambda rows: data.eval_batch(
      run.dataset, index=index, rows=rows, batch_size=size,
      block_size=config.block_size)
  makers = [make(i) for i in range(config.eval_iters)]
  return _mean(run, params, makers)[0]


def full(run, params):
  """The loss over every token of the validation split.

  Returns:
    {'val_loss_full': nats a token, 'bits_per_byte': where the number of bytes
    is known, 'val_tokens': how many}.
  """
  dataset, size, T = run.dataset, _rows(run), run.config.block_size
  make = lambda index: lambda rows: data.full_batch(
      dataset, index=index, rows=rows, batch_size=size, block_size=T)
  count = data.full_batches(dataset, batch_size=size, block_size=T)
  mean, tokens = _mean(run, params, map(make, range(count)))
  result = {'val_loss_full': mean, 'val_tokens': tokens}
  if dataset.val_bytes:
    # As if the first token, never a target, had the mean loss.
    result['bits_per_byte'] = (
        mean * len(dataset.val) / dataset.val_bytes / math.log(2))
  return result


def bigram_loss(dataset, *, prior=0.1):
  """What a table of the training split's pairs gives on the validation split.

  In nats a token, of the first 10 million tokens at most of each. What a
  model that sees one token back could learn; every pair is counted `prior`
  times more than it was seen.
  """
  train, val = (np.asarray(x[:10_000_000], np.int64)
                for x in (dataset.train, dataset.val))
  size = dataset.vocab_size
  pairs, counts = np.unique(train[:-1] * size + train[1:], return_counts=True)
  wanted = val[:-1] * size + val[1:]
  place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
  seen = np.where(pairs[place] == wanted, counts[place], 0)
  first = np.bincount(train[:-1], minlength=size)[val[:-1]]
  return float(np.log((first + prior * size) / (seen + prior)).mean())


def _rows(run):
  return run.config.batch_size // run.config.gradient_accumulation_steps


def _mean(run, params, makers):
  """(mean loss, number of targets) over batches, read when all are queued."""
  pending = [
      run.evaluator(params, sharding.global_batch(make, _rows(run), run.mesh))
      for make in makers]
  sums = np.asarray(jax.device_get(pending), np.float64).sum(0)
  return float(sums[0] / max(sums[1], 1)), int(sums[1])
