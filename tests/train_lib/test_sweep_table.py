"""What a sweep says: lines, one that moves on a terminal, the last table."""

import io
import time
import types

import pytest

from tests.train_lib import folders
from train_lib import sweep_table


class Terminal(io.StringIO):

  def isatty(self):
    return True


@pytest.fixture
def points(tmp_path):
  """Two runs: one is done, the other has 20 steps of 40."""
  folders.write(tmp_path / 'a', 1.5)
  folders.write(tmp_path / 'b', 1.25, finished=False)
  config = types.SimpleNamespace(max_iters=40)
  return [types.SimpleNamespace(name=name, config=config) for name in 'ab']


def said(out, points, tmp_path, monkeypatch, wait=0.0):
  monkeypatch.setattr(sweep_table.sys, 'stdout', out)
  monkeypatch.setattr(sweep_table, 'REFRESH', 0.01)
  with sweep_table.Live(points, tmp_path) as live:
    live.ended(points[0], None)
    live.begin(points[1])
    time.sleep(wait)
    live.ended(points[1], 'diverged')
  return out.getvalue()


def test_no_cursor_moves_where_there_is_none(points, tmp_path, monkeypatch):
  assert said(io.StringIO(), points, tmp_path, monkeypatch).splitlines() == [
      '[1/2]  a  val_loss_full 1.5  2 s  best so far',
      '[1/2]  b  begins, about 2 s left',
      '[2/2]  b  failed: diverged']


def test_the_last_line_of_a_terminal_moves(points, tmp_path, monkeypatch):
  monkeypatch.setenv('COLUMNS', '60')
  text = said(Terminal(), points, tmp_path, monkeypatch, wait=0.5)
  lines = text.split('\r\x1b[K')
  line = next(line for line in lines if 'step' in line)
  assert line.startswith('[1/2]  step 20 of 40  val_loss_full 1.25  best 1.5')
  assert len(line) <= 60 and '\n' not in line
  assert 'begins' not in text and text.endswith('\r\x1b[K')


def test_the_table_has_the_best_first(points, tmp_path):
  folders.write(tmp_path / 'c', 1.0)
  points.append(types.SimpleNamespace(name='c'))
  rows = sweep_table.final(points, tmp_path, {'b': 'word ' * 50}).splitlines()
  assert [row.split()[0] for row in rows] == ['run', 'c', 'a', 'b']
  assert rows[-1].endswith('...') and len(rows[-1]) < 120


@pytest.mark.parametrize('seconds, text', [
    (12.4, '12 s'), (300, '5 min'), (7200, '2.0 h')])
def test_durations(seconds, text):
  assert sweep_table.duration(seconds) == text
