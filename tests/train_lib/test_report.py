"""What is said before and after a run."""

import types

import pytest

from train_lib import metrics, report, trainer
from train_lib import run as run_lib


@pytest.mark.usefixtures('one_device')
def test_a_finished_run_is_told_in_full(config, workdir, capsys):
  """Nothing is left to train: the header, then the table and a sample."""
  config.eval_final = True
  trainer.train(config, workdir)
  told = capsys.readouterr().out
  for word in ('parameters', 'kernels', 'resumed', 'from step 6 of 6',
               'compiled in', 'validation loss', 'bits a byte', 'bigram',
               'sample:', str(workdir)):
    assert word in told, word


def test_what_the_mesh_does_not_divide_is_told(config, tmp_path):
  config.update(mesh_data=2, mesh_fsdp=2, mesh_tensor=2, vocab_size=257)
  run = run_lib.open_run(config, tmp_path / 'run')
  assert 'does not divide embed/tokens' in report.header(run, 0, {})


def test_kernels():
  assert report.kernels({}) == 'none needed'
  assert report.kernels({'attention.kernels.flash': {
      'tpu': '', 'xla': 'width 5'}}) == 'flash: tpu, xla (width 5)'


def test_a_program_that_does_not_say_what_it_needs():
  silent = types.SimpleNamespace(memory_analysis=lambda: None)
  assert report.compiled(silent, 1.25) == 'compiled in 1.2 s'
  assert metrics.table([('a', '1'), ('bb', '2')]) == '  a   1\n  bb  2'
