"""A task from its flags to its accuracy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default, grid
from tests.train_lib import runs
from train_lib import evaluate, inference, loss, tasks, trainer
from train_lib import run as run_lib


def small(task, **flags):
  return runs.small(
      f'task:{task}', dropout=0.0,
      use_abs_pos_embeddings=False, **flags)


@pytest.mark.usefixtures('one_device')
def test_loss_and_accuracy_are_of_the_labels_alone(tmp_path):
  """Against the logits of every token, row by row."""
  config = small('parity(length=9)', eval_slices=('length=14',))
  run = run_lib.open_run(config, tmp_path / 'run')
  assert run.config.block_size == 9 and run.config.vocab_size == 2
  params = jax.jit(run.model.init)(jax.random.key(0))
  module, found = run.model.merge(params), []
  for index in range(config.eval_iters):
    batch = run.dataset.eval_batch(
        index=index, rows=slice(None), batch_size=8, block_size=9)
    logits, _ = module(jnp.maximum(batch['tokens'], 0))
    for row, places, targets in zip(
        np.asarray(logits), batch['places'], batch['targets']):
      scores = row[places[0]]
      found.append((np.logaddexp(*scores) - scores[targets[0]],
                    scores.argmax() == targets[0]))
  columns = evaluate.Evaluator(run).columns(params)
  assert list(columns) == [
      'val_loss', 'val_accuracy', 'val_loss[length=14]',
      'val_accuracy[length=14]']
  np.testing.assert_allclose(
      [columns['val_loss'], columns['val_accuracy']],
      np.mean(found, axis=0), rtol=1e-5)


@pytest.mark.usefixtures('one_device')
def test_a_sweep_knows_its_runs_of_a_task_again(tmp_path):
  """Though their block_size has become the length of the rows."""
  config = small('parity(length=9)', eval_slices=('length=14',))
  run = run_lib.open_run(
      config.copy_and_resolve_references(), tmp_path / 'run')
  saved = json.loads(json.dumps(run.config.to_dict()))
  assert saved['block_size'] == 9 != config.block_size
  assert grid.same(config, saved) == []
  assert grid.same(config, {**saved, 'n_embd': 64}) == ['n_embd']


def test_no_logits_but_at_labels():
  """The hidden states are gathered before the head."""
  batch = {'tokens': np.array([[3, 1, -1]]), 'places': np.array([[1, 0]]),
           'targets': np.array([[5, -1]])}
  inputs, targets, ids = loss.targets_of(batch)
  assert inputs.tolist() == [[3, 1, 0]] and ids is None
  assert targets.tolist() == [[5, -1]]
  hidden = jnp.arange(6.0).reshape(1, 3, 2)
  assert loss.at_targets(hidden, batch).tolist() == [[[2, 3], [0, 1]]]


@pytest.mark.usefixtures('one_device')
def test_a_run_of_a_task_trains_resumes_and_is_evaluated(tmp_path, capsys):
  config = small('copy(length=4, rows=50)', eval_final=True, max_iters=15)
  config.eval_slices = ('length=6',)
  trainer.train(config, tmp_path / 'run')
  config.max_iters = 30
  history = trainer.train(config, tmp_path / 'run')
  whole = trainer.train(config, tmp_path / 'whole')
  assert runs.losses(history) == runs.losses(whole)[15:]
  assert 0 <= history[-1]['val_accuracy_full[length=6]'] <= 1
  said = capsys.readouterr().out
  assert 'chance 0.0667, solved from 0.99' in said
  assert 'resumed' in said and 'wanted' in said and 'got' in said
  result = inference.evaluate_run(config, tmp_path / 'run')
  assert {'val_accuracy_full', 'val_loss_full[length=6]'} <= result.keys()
  assert 'accuracy[length=6]' in capsys.readouterr().out
  with pytest.raises(ValueError, match='is a task: use --mode=eval'):
    inference.sample_run(config, tmp_path / 'run')


@pytest.mark.parametrize('flags, told', [
    (dict(tokenizer='char'), 'tokenizer=char has no effect'),
    (dict(packing=True), 'packing=True has no effect'),
    (dict(val_fraction=0.2), 'val_fraction=0.2 has no effect'),
    (dict(eval_slices=('length=99',)), 'give --nouse_abs_pos_embeddings'),
    (dict(eval_slices=('lenth=9',)), 'did you mean length?'),
    (dict(dataset='task:copi'), 'did you mean copy?'),
    (dict(dataset='pydoc', eval_slices=('length=9',)), 'is not known'),
])
@pytest.mark.usefixtures('one_device')
def test_what_makes_no_sense_is_one_line(flags, told, tmp_path):
  config = runs.small('task:copy')
  config.update(flags)
  with pytest.raises(ValueError) as error:
    run_lib.open_run(config, tmp_path / 'run')
  assert told in str(error.value) and '\n' not in str(error.value)


@pytest.mark.usefixtures('one_device')
def test_another_block_size_is_told(tmp_path):
  run = run_lib.open_run(small('copy(length=4)'), tmp_path / 'run')
  assert run.config.block_size == 8
  assert 'block_size is 8' in run.dataset.notes[0]


# What must solve a task, and soon: (task, flags).
ORACLES = {
    'copy': ('copy(length=6, vocab=8)', dict(use_abs_pos_embeddings=True)),
    'induction': ('induction(length=16)', dict(attention_variant='ssm')),
    'modular': ('modular(length=4)', dict(
        use_abs_pos_embeddings=True, batch_size=64, max_iters=300)),
    'mqar': ('mqar(length=32, pairs=4, vocab=32)', dict(
        use_rotary_embeddings=True, batch_size=64, max_iters=400)),
    'needle': ('needle(length=96, digits=1)', dict(
        attention_variant='deltanet', max_iters=300)),
    'noisy_recall': ('noisy_recall(length=32, vocab=8, noise_vocab=4)', dict(
        attention_variant='deltanet', max_iters=300)),
    'parity': ('parity(length=20)', dict(
        attention_variant='deltanet', delta_beta_max=2.0, n_layer=1, n_embd=32,
        n_head=2, batch_size=64, max_iters=600)),
    # The products of two are 14,400 to learn by heart.
    's5': ('s5(length=1)', {}),
    'selective_copy': ('selective_copy(length=8, copies=2, vocab=6)',
                       dict(attention_variant='ssm', max_iters=600)),
}


def test_every_task_has_an_oracle():
  assert set(ORACLES) == set(tasks.names())


@pytest.mark.slow
@pytest.mark.parametrize('name', ORACLES)
@pytest.mark.usefixtures('one_device')
def test_the_oracle_solves_it(name, tmp_path):
  task, flags = ORACLES[name]
  config = default.get_config()
  config.update(
      dataset=f'task:{task}', n_layer=2, n_embd=64, batch_size=32,
      max_iters=200, eval_interval=0, mesh_data=1,
      use_abs_pos_embeddings=False)
  config.update(flags)
  final = trainer.train(config, tmp_path / 'run')[-1]
  assert final['val_accuracy_full'] >= 0.99
