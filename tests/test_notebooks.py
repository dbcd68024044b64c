"""The notebooks run."""

import json
import pathlib

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'
# What a cell tagged `parameters` sets, so that a test takes less time.
PARAMETERS = {'inspect': dict(max_iters=20)}
# {notebook: what is to hold at its end}.
ENDS = {
    'compare': lambda names: all(
        history for _, _, history in names['runs'].values()),
    'inspect': lambda names: names['best'].shape == (
        len(names['layers']) + 1, names['T']),
}
every_notebook = pytest.mark.parametrize(
    'path', sorted(NOTEBOOKS.glob('*.ipynb')), ids=lambda path: path.stem)


def code(path):
  return [cell for cell in json.loads(path.read_text())['cells']
          if cell['cell_type'] == 'code']


@pytest.mark.slow
@every_notebook
def test_notebook(path):
  plt = pytest.importorskip('matplotlib.pyplot')
  plt.switch_backend('agg')
  names = {'__name__': path.stem}
  for cell in code(path):
    exec(''.join(cell['source']), names)
    if 'parameters' in cell['metadata'].get('tags', ()):
      given = PARAMETERS[path.stem]
      assert given.keys() <= names.keys()
      names |= given
  plt.close('all')
  assert ENDS[path.stem](names)


@every_notebook
def test_nothing_that_a_run_left_is_stored(path):
  for cell in code(path):
    assert not cell['outputs'] and cell['execution_count'] is None
    assert all(len(line) <= 81 for line in cell['source'])
