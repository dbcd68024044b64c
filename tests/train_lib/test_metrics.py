"""What a run tells while it goes on."""

import json
import math
import pathlib
import sys
import types

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


@pytest.mark.parametrize('dispatched', [0, 8], ids=['waiting', 'at-once'])
def test_a_step_takes_what_it_takes(config, monkeypatch, dispatched):
  """8 ms, wherever the host waits for it, and with pauses of 100 ms."""
  clock, rows = [0.0], []
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: clock[0])

  def spend(ms):
    clock[0] += ms / 1e3

  class Value:

    def __init__(self, number):
      self.number = number

    def is_ready(self):
      return dispatched > 0

    def item(self):
      return self.number

  def device_get(values):
    spend(8 - dispatched)
    return values
  monkeypatch.setattr(metrics.jax, 'device_get', device_get)
  meter = metrics.Meter(
      types.SimpleNamespace(config=config, workdir='', flops_per_token=int),
      types.SimpleNamespace(tokens=0, write=lambda step, row: rows.append(row),
                            progress=lambda *_: None), 0)
  for step in range(8):
    spend(dispatched)
    meter.add({name: Value(1.0) for name in (
        'loss', 'grad_norm', 'learning_rate', 'skipped')})
    if step % 3 == 2:
      with meter.pause():
        spend(100)
  meter.flush()
  assert [row['ms_per_step'] for row in rows] == pytest.approx([8] * 8)


@pytest.mark.parametrize('value,text', [
    (1234567, '1,234,567'), (0.123456, '0.1235'), (12345.6, '12,346')])
def test_numbers_are_short(value, text):
  assert metrics.short(value) == text


def test_profile(trained):
  assert list(trained.workdir.rglob('*.xplane.pb'))


def test_no_line_is_wider_than_the_terminal(monkeypatch):
  rows = [('name', 'a value that is far too long for the width of a small '
           'terminal, with runs/a-folder'), ('', 'short')]
  assert metrics.table(rows).count('\n') == 1  # Not to a file.
  for width in (30, 60, 200):
    monkeypatch.setattr(metrics, 'columns', lambda width=width: width)
    lines = metrics.table(rows).splitlines()
    assert max(map(len, lines)) <= width
    assert ' '.join(' '.join(lines).split()) == f'name {rows[0][1]} short'
    line = metrics.fitted(['step 1', 'loss 3.1', 'grad_norm 1.2', 'x' * 20])
    assert len(line) <= width and line.startswith('step 1  loss 3.1')
  monkeypatch.setattr(metrics, 'columns', lambda: 1)
  assert metrics.fitted(['step 1', 'loss 3.1']) == 'step 1'


def test_a_package_that_is_missing_is_told_before_compiling(
    config, tmp_path, monkeypatch):
  for flag, package in (('wandb', 'wandb'), ('tensorboard', 'tensorboardX')):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f'--{flag} needs the package'):
      config[flag] = 'project' if flag == 'wandb' else True
      metrics.Logger(config, tmp_path)
    config[flag] = None if flag == 'wandb' else False


def test_wandb_is_told_what_the_run_is(config, tmp_path, monkeypatch):
  asked = {}
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(
      init=lambda **kwargs: asked.update(kwargs) or types.SimpleNamespace(
          finish=lambda: None)))
  config.update(wandb='lab', wandb_group='ssm', wandb_notes='a try')
  with metrics.Logger(config, tmp_path / 'here') as log:
    (tmp_path / 'here').mkdir()
    log.begin(0)
  assert {name: asked[name] for name in ('project', 'name', 'group', 'notes')
          } == dict(project='lab', name='here', group='ssm', notes='a try')
