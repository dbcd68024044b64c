"""What is checked of a config and of a folder before anything is computed."""

import json

import pytest

from train_lib import run as run_lib
from train_lib import trainer

BAD = [
    ('gradient_accumulation_steps', 3, 'batch_size .8. must be a multiple'),
    ('mesh_tensor', 3, 'does not fit the 1 devices'),
    ('eval_batch_size', 0, 'eval_batch_size .0. must be at least 1'),
    ('nan_policy', 'hope', 'unknown nan_policy'),
    ('optimizer', 'adam', 'did you mean adamw'),
    ('lr_schedule', 'cosin', 'did you mean cosine'),
    ('mlp_variant', 'glu', 'did you mean gelu'),
    ('norm_variant', 'rms', 'known: rmsnorm, layernorm'),
    ('attention_variant', 'casual', 'did you mean causal'),
    ('block_size', 10**6, 'block_size'),
    ('n_head', 3, r'n_head \(3\) must divide n_embd \(16\)'),
    ('n_kv_group', 3, r'n_kv_group \(3\) must divide n_head \(2\): use 1 or 2'),
    ('dataset', '/nowhere/at/all', 'dataset'),
    ('vocab_size', 10, 'vocab_size'),
    ('eval_iters', 0, 'eval_iters'),
    ('remat', 'some', 'unknown remat'),
    ('compute_dtype', 'float16', 'unknown compute_dtype'),
    ('profile_steps', ('1',), 'profile_steps'),
    ('val_fraction', 0.0, 'validation split .* has 0 .*--noeval_final'),
    ('val_fraction', 0.001, 'validation split .* fewer than 17'),
    ('val_fraction', 0.999, 'training split .* fewer than 17'),
]
pytestmark = pytest.mark.usefixtures('one_device')


@pytest.mark.parametrize('flag,value,message', BAD, ids=str)
def test_bad_flags_get_one_line(config, tmp_path, flag, value, message):
  config[flag] = value
  with pytest.raises(ValueError, match=message) as error:
    trainer.train(config, tmp_path / 'run')
  assert '\n' not in str(error.value)


def test_another_model_is_refused(config, trained):
  config.n_embd = 32
  with pytest.raises(ValueError, match='n_embd is 32.*n_embd=16'):
    trainer.train(config, trained.workdir)
  config.n_embd, config.tokenizer = 16, 'char'
  with pytest.raises(ValueError, match='tokenizer|vocab_size'):
    trainer.train(config, trained.workdir)


@pytest.mark.parametrize('optimizer', ['lion', 'sgd', 'adafactor', 'muon'])
def test_another_optimiser_is_refused(config, trained, optimizer):
  config.optimizer = optimizer
  with pytest.raises(ValueError, match=f'optimizer is {optimizer}, .* has '
                     'optimizer=adamw'):
    trainer.train(config, trained.workdir)
  assert not (trained.workdir / 'damaged').exists()


def test_without_a_validation_split_nothing_is_evaluated(config, tmp_path):
  config.update(val_fraction=0.0, eval_interval=0, max_iters=2)
  history = trainer.train(config, tmp_path)
  assert not any('val_loss' in row for row in history)


def test_workdir_that_cannot_be_written(config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='--workdir='):
    run_lib.open_run(config, tmp_path / 'file/run')


def test_a_new_folder_is_named_after_the_layers(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config.attention_list = ('causal', 'ssm')
  folder = run_lib.make_workdir(None, config)
  assert folder.is_dir() and folder.parent.name == 'runs'
  assert folder.name.endswith('_causal-ssm')


def test_runs_of_the_same_second_have_folders_of_their_own(
    config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(run_lib.time, 'strftime', lambda _: 'now')
  folders = [run_lib.make_workdir(None, config).name for _ in range(3)]
  assert folders == ['now_causal', 'now_causal_2', 'now_causal_3']


@pytest.mark.parametrize('read_only', [False, True])
def test_the_home_folder_has_one_name(config, tmp_path, monkeypatch, read_only):
  monkeypatch.setenv('HOME', str(tmp_path))
  run = run_lib.open_run(config, '~/run', read_only=read_only)
  assert run.workdir == tmp_path / 'run'


def test_the_config_is_left_in_the_folder(trained):
  saved = json.loads((trained.workdir / 'config.json').read_text())
  assert saved['vocab_size'] == 256 and 'workdir' not in saved
