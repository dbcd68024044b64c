"""Validation losses are means over targets, each counted once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_lib import data, evaluate, loss
from train_lib import run as run_lib
from train_lib.evaluate import Evaluator


@pytest.mark.usefixtures('one_device')
def test_quick_and_full_are_means_over_their_targets(config, tmp_path):
  run = run_lib.open_run(config, tmp_path / 'run')
  params = jax.jit(run.model.init)(jax.random.key(0))

  @jax.jit
  def each(batch):
    inputs, targets, _ = loss.targets_of(batch)
    module = run.model.merge(params)
    hidden, _ = module.hidden(inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        module.logits(hidden), jnp.maximum(targets, 0))
    return losses, targets >= 0

  def by_hand(batch_of, count):
    """The loss of every target of so many batches."""
    batches = [each(batch_of(run.dataset, index=i, rows=slice(None),
                             batch_size=8, block_size=16))
               for i in range(count)]
    losses, wanted = map(np.concatenate, zip(*batches))
    return losses[wanted]

  evaluator = Evaluator(run)
  quick = by_hand(data.eval_batch, config.eval_iters)
  assert evaluator.columns(params) == {
      'val_loss': pytest.approx(quick.mean(), rel=1e-5)}
  full = by_hand(data.full_batch, data.full_batches(
      run.dataset, batch_size=8, block_size=16))
  result = evaluator.full(params)
  assert result['val_tokens'] == len(full) == len(run.dataset.val) - 1
  assert result['val_loss_full'] == pytest.approx(full.mean(), rel=1e-5)
  # A token is a byte here.
  assert result['bits_per_byte'] == pytest.approx(
      full.mean() / np.log(2), rel=1e-5)


@pytest.mark.usefixtures('one_device')
def test_accumulation_changes_no_loss(config, tmp_path):
  """The rows of an evaluation are a flag of their own."""
  def evaluators():
    for steps in (1, 4):
      config.gradient_accumulation_steps = steps
      yield Evaluator(run_lib.open_run(config, tmp_path / 'run'))
  one, four = evaluators()
  params = jax.jit(one.model.init)(jax.random.key(0))
  assert one.columns(params) == four.columns(params)
  config.eval_batch_size = 2
  fewer = Evaluator(run_lib.open_run(config, tmp_path / 'run'))
  assert fewer.full(params)['val_loss_full'] == pytest.approx(
      one.full(params)['val_loss_full'], rel=1e-6)


def test_evaluation_rows_fit_the_mesh(config, tmp_path):
  config.update(mesh_data=8, eval_batch_size=12)
  with pytest.raises(ValueError, match=r'eval_batch_size \(12\) must be a mul'):
    run_lib.open_run(config, tmp_path / 'run')


@pytest.mark.usefixtures('one_device')
def test_few_batches_are_on_their_way_at_once(config, tmp_path, monkeypatch):
  """A signal waits for them; and each holds its tokens in memory."""
  run = run_lib.open_run(config, tmp_path / 'run')
  evaluator, queued, most = Evaluator(run), [], []
  monkeypatch.setattr(evaluate, 'QUEUED', 2)

  def sums(params, batch):
    queued.append(None)
    most.append(len(queued))
    return np.float32([6]), np.int32([1]), np.int32([2])

  def device_get(pair):
    queued.pop()
    return pair
  monkeypatch.setattr(evaluator, 'sums', sums)
  monkeypatch.setattr(evaluate.jax, 'device_get', device_get)
  assert evaluator.full(None)['val_loss_full'] == 3
  assert len(most) > 3 and max(most) == 3 and not queued
