"""--mode=report: three files that say the same, and need nothing else."""

import csv
import html.parser
import json
import re
import sys

import pytest

from configs import default
from tests.train_lib import folders
from train_lib import report_page, results

pytest.importorskip('matplotlib')

VOID = {'meta', 'path', 'use'}
SCORES = {
    'causal': {1e-3: (1.50, 1.52), 3e-3: (1.60, 1.62)},
    'ssm': {1e-3: (1.30, 1.31), 3e-3: (1.20, 1.21)},
    'identity': {1e-3: (2.50, 2.53)},
}


class Balanced(html.parser.HTMLParser):
  """Fails where tags do not close in the order that they open."""

  def __init__(self):
    super().__init__()
    self.open, self.ids = [], []

  def handle_starttag(self, tag, attrs):
    self.ids += [value for name, value in attrs if name == 'id']
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.ids += [value for name, value in attrs if name == 'id']

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag


def report(root):
  config = default.get_config()
  config.update(mode='report', workdir=str(root))
  return report_page.report(config)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Of the report of SCORES."""
  root = tmp_path_factory.mktemp('runs')
  folders.grid(root, SCORES)
  report(root)
  return root / 'report'


@pytest.fixture
def page(folder):
  return (folder / 'index.html').read_text()


def test_the_page_needs_nothing_else(page):
  links = re.findall(r'(?:href|src)="([^"]*)"', page)
  assert links and all(link.startswith('#') for link in links)
  assert '@import' not in page and '<script' not in page


def test_the_page_is_well_formed(page):
  parser = Balanced()
  parser.feed(page)
  assert parser.open == []
  named = set(re.findall(r'(?:href="|url\()#([\w-]+)', page))
  assert named <= set(parser.ids)


def test_plots_take_the_colours_of_the_page(page):
  assert page.count('<figure>') == 7
  assert '#010203' not in page and 'fill: #ffffff' not in page
  assert 'color-scheme: light dark' in page
  for title in ('over steps', 'over tokens', 'over seconds', 'over FLOPs',
                'against state', 'against learning rate'):
    assert title in page


def test_the_result_and_its_doubts_are_told(page):
  assert 'ssm is best: val_loss_full 1.205 ± 0.0071 over 2 seeds' in page
  assert 'resolved' in page and 'Holm' in page
  assert 'ssm: the best learning rate is the highest that was tried' in page


def test_the_table_is_there_for_machines(folder):
  rows = list(csv.DictReader((folder / 'results.csv').open()))
  assert len(rows) == 10
  row = next(r for r in rows if r['run'] == 'ssm,0.003,1')
  assert float(row['score']) == 1.21
  assert (row['attention_variant'], row['seed']) == ('ssm', '1')
  text = (folder / 'report.md').read_text()
  assert '| ssm | 1.205 ± 0.0071 | 2 | 0.003 (highest tried) |' in text


def test_what_did_not_finish_is_listed(tmp_path):
  folders.write(tmp_path / 's/good', 1.0)
  (tmp_path / 's/bad').mkdir()
  (tmp_path / 's/bad/error.txt').write_text('loss <nan>\n')
  (tmp_path / 's/sweep.json').write_text(json.dumps(
      {'runs': {'good': {}, 'bad': {}, 'later': {}}}))
  assert {r.name: r.state for r in results.find(tmp_path)} == {
      's/good': 'finished', 's/bad': 'failed', 's/later': 'not begun'}
  report(tmp_path)
  page = (tmp_path / 'report/index.html').read_text()
  assert 'loss &lt;nan&gt;' in page and 'not begun' in page


def test_slices_have_columns(tmp_path):
  folders.write(tmp_path / 'a', 0.9, metric='val_accuracy',
                more={'val_accuracy_length_128': 0.4})
  report(tmp_path)
  assert 'val_accuracy_length_128' in (
      tmp_path / 'report/report.md').read_text()


def test_columns_are_those_of_the_whole_split_by_their_numbers(tmp_path):
  slices = {f'val_accuracy{full}[length={n}]': 0.5
            for n in (128, 64, 1024) for full in ('', '_full')}
  folders.write(tmp_path / 'a', 0.9, metric='val_accuracy_full', more=slices)
  report(tmp_path)
  text = (tmp_path / 'report/report.md').read_text()
  head = next(
      line for line in text.splitlines() if line.startswith('| variant'))
  assert [cell for cell in head.split(' | ') if 'length' in cell] == [
      f'val_accuracy_full[length={n}]' for n in (64, 128)] + [
          'val_accuracy_full[length=1024] |']


def test_slices_of_a_task_are_a_plot(tmp_path):
  """Over the option that tells them apart, with what training had."""
  for seed, score in enumerate((0.9, 0.8)):
    folders.write(
        tmp_path / str(seed), score, metric='val_accuracy_full', seed=seed,
        dataset='task:parity(length=30)',
        eval_slices=['(shortest=40, length=60)', 'length=120'],
        more={'val_accuracy_full[(shortest=40, length=60)]': 0.7,
              'val_accuracy_full[length=120]': 0.5})
  report(tmp_path)
  page = (tmp_path / 'report/index.html').read_text()
  assert 'val_accuracy_full against length.</b> Trained at 30;' in page
  plot = (tmp_path / 'report/val_accuracy_full-against-length.svg').read_text()
  assert all(f'>{length}<' in plot for length in (30, 60, 120))


def test_slices_of_another_task_are_not_in_the_plot(tmp_path):
  for name, score in (('parity', 0.9), ('copy', 0.3)):
    folders.write(
        tmp_path / name, score, metric='val_accuracy_full',
        dataset=f'task:{name}(length=8)', eval_slices=['length=16'],
        more={'val_accuracy_full[length=16]': score / 2})
  report(tmp_path)
  page = (tmp_path / 'report/index.html').read_text()
  before, _, _ = page.partition('val_accuracy_full against length.</b>')
  figure = before.rpartition('<figure>')[2]
  # The colours of the better one, and of the other.
  assert '#0072b2' in figure and '#d55e00' not in figure


def test_plots_are_files_with_their_key_too(folder):
  text = (folder / 'report.md').read_text()
  named = re.findall(r'!\[.*?\]\((.*?)\)', text)
  assert len(named) == 7
  for name in named:
    plot = (folder / name).read_text()
    parser = Balanced()
    parser.feed(plot)
    assert parser.open == []
    assert all(f'>{variant}</text>' in plot for variant in SCORES)
    assert 'prefers-color-scheme' in plot


def test_one_run_alone(workdir, trained):
  found = report(workdir)
  assert found.runs[0].state == 'finished'
  assert found.runs[0].score == trained.history[-1]['val_loss_full']


@pytest.mark.parametrize('workdir, told', [
    (None, 'needs --workdir'), ('{tmp}/nowhere', 'has no runs')])
def test_mistakes_are_told(workdir, told, tmp_path):
  config = default.get_config()
  config.update(mode='report',
                workdir=workdir and workdir.format(tmp=tmp_path))
  with pytest.raises(ValueError, match=told):
    report_page.report(config)


def test_without_matplotlib(tmp_path, monkeypatch):
  folders.write(tmp_path / 'a', 1.0)
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(ValueError, match=r'pip install -e .\.\[report\]'):
    report(tmp_path)
