"""A run whose layers have options of their own, from the config to a sample."""

import json

import pytest

from tests.train_lib import runs
from train_lib import inference, trainer
from train_lib import run as run_lib

pytestmark = pytest.mark.usefixtures('one_device')
ENTRIES = '2*causal(window_size=4, n_head=1)', 'ssm(ssm_d_state=4)'


RECURRENT = ('3*gated_deltanet(delta_conv_kernel_size=2)',
             'causal(attn_gate=head)', 'mamba2(mamba2_d_state=4)')


@pytest.fixture
def hybrid(config):
  config.update(attention_list=ENTRIES, n_layer=3, max_iters=4, eval_interval=2,
                dropout=0.0)
  return config


def test_it_trains_resumes_decodes_and_evaluates(hybrid, tmp_path, capsys):
  whole = trainer.train(hybrid, tmp_path / 'whole')
  assert 'layers      3: 2*causal(n_head=1, window_size=4)' in (
      capsys.readouterr().out)
  hybrid.max_iters = 2
  trainer.train(hybrid, tmp_path / 'parts')
  hybrid.max_iters = 4
  # The same layers in other words; how one is computed may change.
  hybrid.attention_list = (
      'causal(n_head=1,window_size=4,attention_kernel=xla)',
      'causal(window_size=4, n_head=1)', 'ssm(ssm_d_state=4)')
  resumed = trainer.train(hybrid, tmp_path / 'parts')
  assert resumed[-1]['val_loss'] == whole[-1]['val_loss']
  assert inference.evaluate_run(hybrid, tmp_path / 'parts')['val_tokens'] > 100
  text, = inference.sample_run(hybrid, tmp_path / 'parts')
  assert len(text) > len(hybrid.prompt)


def test_the_folder_says_which_layers(hybrid, tmp_path):
  run = run_lib.open_run(hybrid, tmp_path)
  run_lib.write_config(run)
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['attention_list'] == [
      *['causal(n_head=1, window_size=4)'] * 2, 'ssm(ssm_d_state=4)']


@pytest.mark.parametrize('entries', [
    ('2*causal(window_size=5, n_head=1)', 'ssm(ssm_d_state=4)'),
    ('2*causal(window_size=4)', 'ssm(ssm_d_state=4)'),
    ('ssm(ssm_d_state=4)',)], ids=' '.join)
def test_other_layers_are_refused(hybrid, tmp_path, entries):
  saved = run_lib.saved_config(run_lib.open_run(hybrid, tmp_path).config)
  hybrid.vocab_size = saved['vocab_size']
  run_lib.compatible(saved, hybrid, tmp_path)
  hybrid.attention_list = entries
  with pytest.raises(ValueError, match='layers is .*, but the run in .* has '
                     r'layers=2\*causal\(n_head=1, window_size=4\) ssm'):
    run_lib.compatible(saved, hybrid, tmp_path)


@pytest.mark.slow
def test_layers_of_three_kinds_on_eight_devices(config, tmp_path):
  """Packed, sharded and interrupted: the losses of one device, in one go."""
  folder = tmp_path / 'documents'
  folder.mkdir()
  for i in range(9):
    folder.joinpath(f'{i}.txt').write_text(f'{i} squared is {i * i}\n' * 12)
  config.update(
      attention_list=RECURRENT, n_layer=5, dataset=str(folder), packing=True,
      max_iters=4, eval_interval=2, dropout=0.0)
  whole = trainer.train(config, tmp_path / 'whole')
  losses = []
  runs.set_mesh(config, (2, 2, 2))
  with runs.devices(8):
    for steps in (2, 4):
      config.max_iters = steps
      losses += runs.losses(trainer.train(config, tmp_path / 'parts'))
    assert inference.evaluate_run(config, tmp_path / 'parts')['val_tokens'] > 9
    text, = inference.sample_run(config, tmp_path / 'parts')
  assert losses == pytest.approx(runs.losses(whole), rel=1e-5)
  assert len(text) > len(config.prompt)
