"""A run that is read again: its loss and its samples."""

import pytest

from tests.train_lib import runs
from train_lib import checkpoints, inference, tokenizer
from train_lib.lock import Lock


@pytest.mark.usefixtures('one_device')
def test_the_best_checkpoint_is_evaluated(config, trained, capsys):
  result = inference.evaluate_run(config, trained.workdir)
  assert result['val_loss_full'] == pytest.approx(
      trained.history[-1]['val_loss_full'], abs=1e-6)
  assert 'val_loss_full' in capsys.readouterr().out


def test_samples(config, trained, capsys):
  config.update(prompt='12 squared', max_new_tokens=20)
  one = inference.sample_run(config, trained.workdir)
  assert one[0].startswith('12 squared')
  assert one[0] in capsys.readouterr().out
  config.num_samples = 2
  assert len(inference.sample_run(config, trained.workdir)) == 2


def test_a_single_sample_reads_as_one_of_many(config, trained, monkeypatch):
  """It is printed as it is drawn: the first token after the prompt, too."""
  model, _, step = inference.load(trained.workdir, config)
  monkeypatch.setattr(inference, 'load', lambda *_: (
      model, tokenizer.Ids(model.vocab_size), step))
  config.update(prompt='49 50', temperature=0.0)
  one, = inference.sample_run(config, trained.workdir)
  config.num_samples = 2
  assert inference.sample_run(config, trained.workdir) == [one, one]
  assert one.startswith('49 50 ')


def test_what_a_terminal_cannot_write_is_escaped(config, trained):
  config.update(mode='sample', prompt='\u2200x', tokenizer='byte')
  process = runs.start_main(
      config, trained.workdir, PYTHONIOENCODING='ascii')
  said, _ = process.communicate(timeout=120)
  assert process.returncode == 0, said
  assert '\\u2200x' in said


def test_more_samples_than_fit(config, trained):
  config.num_samples = 2 ** 31 - 1
  with pytest.raises(ValueError, match='states need .* num_samples=2147483647'):
    inference.sample_run(config, trained.workdir)


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('mode', ['evaluate_run', 'sample_run'])
def test_a_run_is_read_wherever_it_is_and_left_alone(
    config, trained, monkeypatch, mode):
  monkeypatch.setenv('HOME', str(trained.workdir.parent))
  seen = lambda: {path: path.stat().st_mtime_ns
                  for path in [trained.workdir, *trained.workdir.rglob('*')]}
  with Lock(trained.workdir):  # Somebody trains there.
    before = seen()
    getattr(inference, mode)(config, '~/' + trained.workdir.name)
    assert seen() == before


@pytest.mark.usefixtures('one_device')
def test_evaluation_needs_two_tokens_before_it_loads_anything(
    config, trained, monkeypatch):
  config.val_fraction = 0.0
  monkeypatch.setattr(checkpoints.Checkpoints, 'restore', None)
  with pytest.raises(ValueError, match='validation split .* fewer than 2'):
    inference.evaluate_run(config, trained.workdir)


def test_a_folder_without_a_run_is_refused(config, tmp_path):
  with pytest.raises(ValueError, match='no checkpoints'):
    inference.sample_run(config, tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='--mode=eval needs --workdir'):
    inference.evaluate_run(config)
