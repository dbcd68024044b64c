"""What a run tells while it goes on."""

import json

import pytest

from train_lib import metrics


def test_the_file_has_the_history(trained):
  rows = (trained.workdir / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(row) for row in rows] == trained.history


def test_rows_after_the_resumed_step_are_dropped(config, tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 3.0}\n{"step": 4, "loss": 2.0}\n{"st')
  with metrics.Logger(config, tmp_path) as log:
    log.begin(2)
    log.write(3, {'loss': 1.5})
  assert [json.loads(row) for row in path.read_text().splitlines()] == [
      {'step': 1, 'loss': 3.0}, {'step': 3, 'loss': 1.5}]
  assert 'loss 1.5' in capsys.readouterr().out


@pytest.mark.parametrize('value,text', [
    (1234567, '1,234,567'), (0.123456, '0.1235'), (12345.6, '12,346')])
def test_numbers_are_short(value, text):
  assert metrics.short(value) == text


def test_profile(trained):
  assert list(trained.workdir.rglob('*.xplane.pb'))
