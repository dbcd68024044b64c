"""The tables of the documents are what the code says."""

import ast
import pathlib

from docs import tables

ROOT = pathlib.Path(__file__).parents[1]


def test_tables_are_up_to_date():
  for name in tables.FILES:
    text = (ROOT / name).read_text()
    assert tables.fill(text) == text, f'{name}: run python -m docs.tables'


def test_every_preset_is_in_the_readme():
  readme = (ROOT / 'README.md').read_text()
  for path in (ROOT / 'configs').glob('*.py'):
    tree = ast.parse(path.read_text())
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    if 'get_config' in names and path.stem != 'default':
      assert path.name in readme, f'{path.name} is missing in README.md'
