"""What a run tells while it goes on."""

import json
import math
import pathlib

import pytest

from train_lib import metrics


def test_the_file_has_the_history(trained):
  rows = (trained.workdir / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(row) for row in rows] == trained.history


def rows_of(path):
  return [json.loads(row) for row in path.read_text().splitlines()]


def test_rows_after_the_resumed_step_are_dropped(config, tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 3.0}\n{"step": 4, "loss": 2.0}\n')
  with metrics.Logger(config, tmp_path) as log:
    log.begin(2, tokens=64, elapsed=5.0)
    log.write(3, {'loss': 1.5})
  first, second = rows_of(path)
  assert first == {'step': 1, 'loss': 3.0}
  assert (second['step'], second['loss'], second['tokens']) == (3, 1.5, 64)
  assert 5 <= second['elapsed_s'] < 6
  said = capsys.readouterr().out
  assert 'loss 1.5' in said and '1 rows after step 2 will' in said


@pytest.mark.parametrize('foreign', [
    '{"st', '7', 'null', '[]', '"step"', '{"loss": 1}', '{"step": "1"}', '',
    '\x00\x00', '{"step": 2}', '[' * 100_000])
def test_what_is_no_row_is_left_out_with_a_word(
    config, tmp_path, capsys, foreign):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n' + foreign + '\n' * (foreign != '{"step": 2}'))
  with metrics.Logger(config, tmp_path) as log:
    log.begin(2)
  assert rows_of(path) == [{'step': 1}]
  assert ': 1 rows were cut off or no metrics' in capsys.readouterr().out


def test_a_kill_leaves_the_file_or_its_successor(config, tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 4}\n')
  before = path.read_text()

  def killed(self, target):
    raise KeyboardInterrupt
  monkeypatch.setattr(pathlib.Path, 'replace', killed)
  with pytest.raises(KeyboardInterrupt), metrics.Logger(
      config, tmp_path) as log:
    log.begin(2)
  assert path.read_text() == before


def test_what_is_not_finite_is_null(config, tmp_path):
  with metrics.Logger(config, tmp_path) as log:
    log.begin(0)
    log.write(1, {'a': math.nan, 'b': math.inf, 'c': -math.inf, 'd': 1.0})
  row, = rows_of(tmp_path / 'metrics.jsonl')
  assert [row[name] for name in 'abcd'] == [None, None, None, 1.0]


@pytest.mark.parametrize('value,text', [
    (1234567, '1,234,567'), (0.123456, '0.1235'), (12345.6, '12,346')])
def test_numbers_are_short(value, text):
  assert metrics.short(value) == text


def test_profile(trained):
  assert list(trained.workdir.rglob('*.xplane.pb'))
