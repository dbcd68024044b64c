"""--stop_when: what it understands, and a run that ends so."""

import pytest

from tests.train_lib import runs
from train_lib import goal, inference, record, results, tasks, trainer
from train_lib.tasks import dataset

pytestmark = pytest.mark.usefixtures('one_device')
TASK = dataset.Dataset(
    tasks.parse('task:parity(length=16)'), slices=('length=32',))
SUMS = dict(tokens=1000, elapsed=2.0)


@pytest.mark.parametrize('text, columns, holds', [
    ('accuracy > 0.99', dict(val_accuracy=1.0), True),
    ('accuracy > 0.99', dict(val_accuracy=0.99), False),
    ('val_accuracy>=0.99', dict(val_accuracy=0.99), True),
    ('loss < 1e-2', dict(val_loss=0.001), True),
    ('loss <= 1', dict(val_loss=float('nan')), False),
    ('accuracy[length=32] > .5', {'val_accuracy[length=32]': 0.6}, True),
    ('tokens >= 1000', {}, True), ('tokens > 1_000', {}, False),
    ('seconds > 1.5', {}, True), ('seconds > 60', {}, False),
])
def test_what_holds(config, text, columns, holds):
  config.stop_when = text
  assert goal.parse(config, TASK).reached(columns, SUMS) is holds


@pytest.mark.parametrize('text, message', [
    ('accuracy', "stop_when='accuracy' is not of the form NAME > NUMBER"),
    ('accuracy > much', 'is not of the form'),
    ('accuracy == 1', 'is not of the form'),
    ('accuracy > 1 > 0', 'is not of the form|is not measured'),
    ('perplexity < 3', r'perplexity is not measured; what is: loss, accuracy, '
     r'loss\[length=32\], accuracy\[length=32\], tokens, seconds'),
])
def test_what_says_nothing(config, text, message):
  config.stop_when = text
  with pytest.raises(ValueError, match=message):
    goal.parse(config, TASK)


def test_text_has_no_accuracy(config, tmp_path):
  config.stop_when = 'accuracy > 0.9'
  with pytest.raises(ValueError, match='what is: loss, tokens, seconds'):
    trainer.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  config.update(stop_when='loss < 1', eval_interval=0)
  with pytest.raises(ValueError, match='set eval_interval'):
    trainer.train(config, tmp_path / 'run')


def test_a_run_ends_there_and_may_go_on(config, tmp_path, capsys):
  tokens = config.batch_size * config.block_size
  config.update(max_iters=12, eval_interval=4, stop_when=f'tokens>{6 * tokens}')
  workdir = tmp_path / 'run'
  first = trainer.train(config, workdir)
  assert [row['step'] for row in first if 'loss' in row] == [*range(1, 9)]
  said = capsys.readouterr().out
  assert f'ends when tokens>{6 * tokens}, or after 12' in ' '.join(said.split())
  assert f'step 8: tokens>{6 * tokens}, as stop_when asks for' in said
  assert record.read(workdir)['finished'] == 8
  assert results.read(workdir).finished

  again = trainer.train(config, workdir)  # It has got there.
  assert not [row for row in again[len(first):] if 'loss' in row]
  assert results.read(workdir).finished

  config.stop_when = None
  trainer.train(config, workdir)
  whole = trainer.train(config, tmp_path / 'whole')
  assert runs.marks(workdir, 12) == runs.marks(tmp_path / 'whole', 12)
  assert results.read(workdir).finished and whole


def test_another_goal_is_not_reached_yet(config, tmp_path):
  config.update(max_iters=4, eval_interval=2, stop_when='seconds > 0')
  trainer.train(config, tmp_path / 'run')
  config.stop_when = 'loss < 0'
  trainer.train(config, tmp_path / 'run')
  assert record.read(tmp_path / 'run') | dict(
      finished=4, stopped_when=None) == record.read(tmp_path / 'run')


def test_an_evaluation_has_no_goal(config, tmp_path):
  """It may have other columns than the training had."""
  config.update(max_iters=2, eval_interval=2, eval_slices=('repeats(n=1)',),
                stop_when='loss[repeats=1] < 0')
  trainer.train(config, tmp_path / 'run')
  config.eval_slices = ('position',)
  found = inference.evaluate_run(config, tmp_path / 'run')
  assert 'val_loss_full[position=1-16]' in found
