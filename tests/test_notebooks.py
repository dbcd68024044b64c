"""The notebooks run."""

import json
import pathlib

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'


@pytest.mark.slow
@pytest.mark.parametrize(
    'path', sorted(NOTEBOOKS.glob('*.ipynb')), ids=lambda path: path.stem)
def test_notebook(path):
  cells = json.loads(path.read_text())['cells']
  names = {'__name__': path.stem}
  for cell in cells:
    if cell['cell_type'] == 'code':
      exec(''.join(cell['source']), names)
  assert all(history for _, _, history in names['runs'].values())
