"""Which targets of a text a slice is about, and the columns that it gives."""

import jax
import numpy as np
import pytest

from train_lib import data, evaluate, inference, trainer
from train_lib import run as run_lib
from train_lib.text_slices import TextSlices


def marks(entry, tokens, ids=None):
  """{label: bool [targets]} of a single row."""
  batch = {'tokens': np.asarray([tokens], np.int32)}
  if ids is not None:
    batch['segment_ids'] = np.asarray([ids], np.int32)
  slices = TextSlices((entry,), len(tokens) - 1)
  masks = slices.mark(batch)['masks']
  assert masks.shape == (1, len(tokens) - 1, len(slices.labels))
  return dict(zip(slices.labels, masks[0].T.astype(int).tolist()))


def test_positions_are_the_tokens_before():
  found = marks('position', range(101))
  assert list(found) == ['position=1-16', 'position=17-64', 'position=65-100']
  assert [sum(mask) for mask in found.values()] == [16, 48, 36]
  assert found['position=17-64'][15:17] == [0, 1]


def test_positions_begin_with_a_document():
  found = marks('position', range(31), [1] * 10 + [2] * 21)
  # The target at 10 is of another document, and counts nowhere.
  assert found['position=1-16'] == [1] * 9 + [0] + [1] * 16 + [0] * 4
  assert found['position=17-30'] == [0] * 26 + [1] * 4


@pytest.mark.parametrize('n, tokens, ids, repeats', [
    (1, 'abac', None, '010'),
    (2, 'abcabd', None, '00010'),
    (3, 'abcabcx', None, '000010'),
    (2, 'aaaa', None, '011'),
    (2, 'ababab', '112222', '00001'),
    (4, 'abc', None, '00'),
])
def test_repeats_end_what_came_before(n, tokens, ids, repeats):
  found = marks(f'repeats(n={n})', [ord(c) for c in tokens],
                ids and [int(i) for i in ids])
  assert found[f'repeats={n}'] == [int(c) for c in repeats]
  assert found[f'fresh={n}'] == [1 - int(c) for c in repeats]


@pytest.mark.parametrize('entry, message', [
    ('positions', r"--eval_slices=positions is not known, did you mean "
     r'position\? of text there are position, repeats'),
    ('length=3', 'is not known'),
    ('repeats(n=0)', r'--eval_slices=repeats\(n=0\): n \(0\) must be at least'),
    ('repeats(m=2)', r"there is no option 'm'"),
    ('position(n=2)', 'there is no option .* known: none'),
])
def test_entries_that_are_none(config, tmp_path, entry, message):
  config.eval_slices = (entry,)
  with pytest.raises(ValueError, match=message):
    run_lib.open_run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('logits_bytes', [2 ** 27, 2 ** 12])
def test_columns_are_means_over_their_targets(
    config, tmp_path, monkeypatch, logits_bytes):
  monkeypatch.setattr('train_lib.loss.LOGITS_BYTES', logits_bytes)
  config.eval_slices = 'position', 'repeats(n=2)'
  run = run_lib.open_run(config, tmp_path / 'run')
  evaluator = evaluate.Evaluator(run)
  params = jax.jit(run.model.init)(jax.random.key(0))
  columns = evaluator.columns(params)
  assert list(columns) == evaluate.names(run.dataset, run.config)
  whole, repeats, fresh = (columns[f'val_loss{mark}'] for mark in (
      '', '[repeats=2]', '[fresh=2]'))
  many = sum(evaluator.slices.mark(data.eval_batch(
      run.dataset, index=i, rows=slice(None), batch_size=8,
      block_size=16))['masks'].mean((0, 1)) for i in range(config.eval_iters))
  share = many / config.eval_iters
  assert share[1] + share[2] == pytest.approx(1)
  assert whole == pytest.approx(columns['val_loss[position=1-16]'], rel=1e-6)
  assert whole == pytest.approx(share[1] * repeats + share[2] * fresh, rel=1e-5)
  config.eval_slices = None
  plain = evaluate.Evaluator(run_lib.open_run(config, tmp_path / 'run'))
  assert plain.columns(params) == {'val_loss': pytest.approx(whole, rel=1e-6)}


@pytest.mark.usefixtures('one_device')
def test_a_run_has_them_at_every_evaluation(config, tmp_path, capsys):
  config.update(max_iters=4, eval_interval=2, eval_final=True,
                eval_slices=('repeats(n=1)',))
  history = trainer.train(config, tmp_path / 'run')
  assert [row['step'] for row in history
          if 'val_loss[repeats=1]' in row and 'val_loss[fresh=1]' in row] == [
              2, 4]
  last = history[-1]
  assert last['val_loss_full[repeats=1]'] != last['val_loss_full']
  assert '[fresh=1]' in capsys.readouterr().out
  config.eval_slices = ('position',)
  again = inference.evaluate_run(config, tmp_path / 'run')
  assert again['val_loss_full[position=1-16]'] == pytest.approx(
      last['val_loss_full'], rel=1e-6)
