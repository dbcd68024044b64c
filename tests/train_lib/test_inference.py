"""A run that is read again: its loss and its samples."""

import pytest

from train_lib import inference


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


def test_more_samples_than_fit(config, trained):
  config.num_samples = 2 ** 31 - 1
  with pytest.raises(ValueError, match='states need .* num_samples=2147483647'):
    inference.sample_run(config, trained.workdir)


def test_a_folder_without_a_run_is_refused(config, tmp_path):
  with pytest.raises(ValueError, match='no checkpoints'):
    inference.sample_run(config, tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='--mode=eval needs --workdir'):
    inference.evaluate_run(config)
