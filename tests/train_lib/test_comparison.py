"""What is made of runs: seeds, learning rates, variants and pairs of them."""

import pytest

from tests.train_lib import folders
from train_lib import comparison, results

SCORES = {
    'causal': {1e-3: (1.50, 1.52, 1.51), 3e-3: (1.60, 1.62, 1.61)},
    'ssm': {1e-3: (1.30, 1.31, 1.32), 3e-3: (1.20, 1.21, 1.22),
            1e-2: (1.40, 1.41, 1.42)},
    'linear': {1e-3: (1.51, 1.53, 1.52)},
}


def compared(root):
  return comparison.compare(results.find(root))


def test_variants_at_their_best_learning_rate(tmp_path):
  folders.grid(tmp_path, SCORES)
  found = compared(tmp_path)
  assert [v.label for v in found.variants] == ['ssm', 'causal', 'linear']
  ssm, causal, linear = found.variants
  assert ssm.best.learning_rate == 3e-3 and ssm.at_edge is None
  assert causal.best.learning_rate == 1e-3 and causal.at_edge == 'lowest'
  assert linear.at_edge is None  # Nothing was tuned.
  assert ssm.best.mean == pytest.approx(1.21)
  assert ssm.best.deviation == pytest.approx(0.01)
  assert ssm.best.runs[0].state_bytes() == 9000
  assert causal.best.runs[0].state_bytes() == 12 + 128 * 4096


def test_pairs_are_resolved_or_not(tmp_path):
  folders.grid(tmp_path, SCORES)
  pairs = {(p.better.label, p.worse.label): p for p in compared(tmp_path).pairs}
  assert pairs['ssm', 'causal'].resolved
  assert pairs['ssm', 'causal'].difference == pytest.approx(-0.30)
  assert not pairs['causal', 'linear'].resolved
  assert pairs['causal', 'linear'].p > 0.05


def test_one_seed_resolves_nothing(tmp_path):
  folders.grid(tmp_path, {'causal': {1e-3: (1.0,)}, 'ssm': {1e-3: (2.0,)}})
  pair, = compared(tmp_path).pairs
  assert pair.p is None and not pair.resolved


def test_accuracies_are_to_rise(tmp_path):
  for name, score in (('causal', 0.9), ('linear', 0.2)):
    folders.write(tmp_path / name, score, metric='val_accuracy',
                  attention_variant=name, more={'val_loss_full': 1 - score})
  found = compared(tmp_path)
  assert found.metric == 'val_accuracy'
  assert [v.label for v in found.variants] == ['causal', 'linear']


def test_labels_say_no_more_than_they_must(tmp_path):
  """A width that was fitted to a variant is left out."""
  for i, (variant, width, layers) in enumerate([
      ('causal', 512, 2), ('causal', 512, 4), ('ssm', 313, 2)]):
    folders.write(tmp_path / str(i), i, attention_variant=variant,
                  mlp_width=width, n_layer=layers)
  assert [v.label for v in compared(tmp_path).variants] == [
      'causal, n_layer=2', 'causal, n_layer=4', 'ssm, n_layer=2']


def test_labels_leave_out_flags_of_other_variants(tmp_path):
  for variant in ('deltanet', 'gated_deltanet', 'causal'):
    for most in (1.0, 2.0):
      if variant != 'causal' or most == 1.0:
        folders.write(tmp_path / f'{variant}{most}', most, delta_beta_max=most,
                      attention_variant=variant)
  assert {v.label for v in compared(tmp_path).variants} == {
      'causal', *(f'{variant}, delta_beta_max={most}' for variant in (
          'deltanet', 'gated_deltanet') for most in (1.0, 2.0))}


def test_a_list_of_layers_is_its_own_label(tmp_path):
  folders.write(tmp_path / 'a', 1.0, attention_list=['causal', 'ssm'])
  folders.write(tmp_path / 'b', 2.0)
  assert [v.label for v in compared(tmp_path).variants] == [
      'causal ssm', 'causal']


def test_other_data_are_no_rivals(tmp_path):
  folders.write(tmp_path / 'a', 1.0, dataset='pydoc')
  folders.write(tmp_path / 'b', 2.0, dataset='shakespeare_char')
  assert compared(tmp_path).pairs == []


def test_runs_that_have_not_finished_count_nothing(tmp_path):
  folders.write(tmp_path / 'a', 1.0)
  folders.write(tmp_path / 'b', 0.1, seed=2, finished=False)
  found = compared(tmp_path)
  assert found.variants[0].best.scores == [1.0]
  assert [run.state for run in found.runs] == ['finished', 'unfinished']


def test_no_score_at_all(tmp_path):
  folders.write(tmp_path / 'a', 1.0, finished=False)
  with pytest.raises(ValueError, match='no run has finished'):
    compared(tmp_path)
