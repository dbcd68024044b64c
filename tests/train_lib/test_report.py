"""What is said before and after a run."""

import types

from train_lib import metrics, report
from train_lib import run as run_lib


def test_a_run_is_told_from_the_header_to_the_sample(trained):
  for word in ('parameters', 'kernels', 'compiled in', 'validation loss',
               'bits a byte', 'bigram', 'best evaluation', 'tokens/s',
               'sample:', str(trained.workdir)):
    assert word in trained.said, word
  assert 'resumed' not in trained.said


def test_the_header_of_a_resumed_run_on_a_mesh(config, tmp_path):
  config.update(mesh_data=2, mesh_fsdp=2, mesh_tensor=2, vocab_size=257)
  run = run_lib.open_run(config, tmp_path / 'run')
  header = report.header(run, 2, {})
  assert 'does not divide embed/tokens' in header
  assert 'from step 2 of 30' in header


def test_kernels():
  assert report.kernels({}) == 'none needed'
  assert report.kernels({'attention.kernels.flash': {
      'tpu': '', 'xla': 'width 5'}}) == 'flash: tpu, xla (width 5)'


def test_a_program_that_does_not_say_what_it_needs():
  silent = types.SimpleNamespace(memory_analysis=lambda: None)
  assert report.compiled(silent, 1.25) == 'compiled in 1.2 s'
  assert metrics.table([('a', '1'), ('bb', '2')]) == '  a   1\n  bb  2'
