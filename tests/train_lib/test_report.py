"""What is said before and after a run."""

import types

import pytest

from train_lib import metrics, report, trainer
from train_lib import run as run_lib


def test_a_run_is_told_from_the_header_to_the_sample(trained):
  for word in ('parameters', 'kernels', 'compiled in', 'validation loss',
               'bits a byte', 'bigram', 'best evaluation', 'tokens/s',
               'entropy of the pairs of the training split',
               '256 tokens in 16 fixed windows',
               'sample:', str(trained.workdir)):
    assert word in trained.said, word
  assert 'resumed' not in trained.said


def test_the_header_of_a_resumed_run_on_a_mesh(config, tmp_path):
  config.update(mesh_data=2, mesh_fsdp=2, mesh_tensor=2, vocab_size=257)
  run = run_lib.open_run(config, tmp_path / 'run')
  header = report.header(run, 2, {})
  assert 'does not divide embed/tokens' in header
  assert 'from step 2 of 30' in header


@pytest.mark.usefixtures('one_device')
def test_a_prompt_without_tokens_is_told(config, tmp_path, capsys):
  config.update(tokenizer='char', prompt='日本', max_iters=1)
  trainer.train(config, tmp_path / 'run')
  assert "char has no tokens for --prompt='日本'" in capsys.readouterr().out


@pytest.mark.usefixtures('one_device')
def test_the_header_says_what_to_mind(config, tmp_path):
  config.update(max_iters=1, warmup_iters=2)
  run = run_lib.open_run(config, tmp_path / 'run')
  assert 'note' in report.header(run, 0, {})
  assert 'is not above warmup_iters (2)' in report.header(run, 0, {})


def test_kernels():
  assert report.kernels({}) == 'none needed'
  assert report.kernels({'attention.kernels.flash': {
      'tpu': '', 'xla': 'width 5'}}) == 'flash: tpu, xla (width 5)'


def test_a_program_that_does_not_say_what_it_needs():
  silent = types.SimpleNamespace(memory_analysis=lambda: None)
  assert report.compiled(silent, 1.25) == 'compiled in 1.2 s'
  assert metrics.table([('a', '1'), ('bb', '2')]) == '  a   1\n  bb  2'
