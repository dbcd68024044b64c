"""What changed between the parts of a run is told, or refused."""

import json
import types

import pytest

from configs import default, flags
from tests.train_lib import runs
from train_lib import changes, inference, trainer

FOX = 'the quick brown fox jumps over the lazy dog\n'
pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture
def fox(tmp_path):
  """A run of characters, and a text without some of them, with others."""
  (tmp_path / 'fox.txt').write_text(FOX * 40)
  (tmp_path / 'other.txt').write_text(FOX.replace('lazy ', 'été ') * 40)
  config = runs.small(
      str(tmp_path / 'fox.txt'), tokenizer='char', max_iters=2, dropout=0.0,
      use_abs_pos_embeddings=False, attention_variant='linear')
  trainer.train(config, tmp_path / 'run')
  return types.SimpleNamespace(config=config, workdir=tmp_path / 'run',
                               other=str(tmp_path / 'other.txt'))


def test_every_flag_that_changed_is_a_line():
  config = default.get_config()
  config.attention_list = ('causal', 'ssm')
  saved = json.loads(json.dumps(config.to_dict()))
  assert changes.lines(saved, config, 60) == []
  del saved['z_loss']  # As before there was such a flag.
  config.update(learning_rate=0.5, n_kv_group=2, prompt='x', z_loss=1.0)
  assert changes.lines(saved, config, 60) == [
      'changed since step 60: z_loss 0.0 -> 1.0',
      'changed since step 60: learning_rate 0.003 -> 0.5',
      'changed since step 60: n_kv_group None -> 2']


def test_a_resumed_run_says_what_changed(config, workdir, capsys):
  config.update(max_iters=31, learning_rate=0.5, eval_final=False)
  trainer.train(config, workdir)
  told = [line for line in capsys.readouterr().out.splitlines()
          if 'changed' in line]
  assert told == [
      'changed since step 30: max_iters 30 -> 31',
      'changed since step 30: learning_rate 0.01 -> 0.5',
      'changed since step 30: eval_final True -> False',
      "changed since step 30: profile_steps ['1', '2'] -> None"]


def test_other_data_are_refused(config, workdir, tmp_path):
  text = tmp_path / 'other.txt'
  text.write_text('This is another text.\n' * 100)
  config.update(dataset=str(text), max_iters=31)
  with pytest.raises(ValueError, match='--allow_changed_data') as error:
    trainer.train(config, workdir)
  assert '\n' not in str(error.value)
  config.allow_changed_data = True
  assert len(runs.losses(trainer.train(config, workdir))) == 1


def test_another_text_is_read_with_the_tokenizer_of_the_run(fox, capsys):
  own = inference.evaluate_run(fox.config, fox.workdir)
  assert 'lost_characters' not in own
  fox.config.dataset = fox.other
  result = inference.evaluate_run(fox.config, fox.workdir)
  assert result['val_loss_full'] == pytest.approx(
      own['val_loss_full'], abs=0.5)
  # As many of the validation text as there are of its lines, twice.
  assert result['lost_characters'] == 8
  assert 'loses 8 of the' in capsys.readouterr().out


def test_any_block_size_where_there_are_no_positions(fox):
  own = inference.evaluate_run(fox.config, fox.workdir)
  fox.config.block_size = 40
  longer = inference.evaluate_run(fox.config, fox.workdir)
  assert longer['val_tokens'] == own['val_tokens']
  assert longer['val_loss_full'] != own['val_loss_full']
  text, = inference.sample_run(fox.config, fox.workdir)
  assert len(text) > 1


def test_a_config_that_was_deleted_is_in_the_checkpoints(fox):
  argv = ['--mode=sample', f'--workdir={fox.workdir}', '--max_new_tokens=9']
  before, *_ = flags.parse(argv)
  (fox.workdir / 'config.json').unlink()
  after, given, _ = flags.parse(argv)
  assert before.to_dict() == after.to_dict()
  assert after.n_embd == 16 and given == {'mode', 'workdir', 'max_new_tokens'}
  (fox.workdir / 'checkpoints/2/meta/metadata').write_text('{"conf')
  assert flags.parse(argv)[0].n_embd == default.get_config().n_embd
