"""The example variant of README.md, as if its file were there."""

import contextlib
import pathlib
import re
import sys

import attention

NAME = 'mean'


def source():
  """The text of the example."""
  text = (pathlib.Path(attention.__file__).parents[1] / 'README.md').read_text()
  return re.search(rf'attention/{NAME}.py.*?```python\n(.*?)```', text,
                   re.DOTALL)[1]


@contextlib.contextmanager
def variant(folder):
  """Adds the example to the variants, from a file in a folder."""
  (folder / f'{NAME}.py').write_text(source())
  attention.__path__.append(str(folder))
  attention.names.cache_clear()
  try:
    yield
  finally:
    attention.__path__.remove(str(folder))
    attention.names.cache_clear()
    sys.modules.pop(f'attention.{NAME}', None)
    vars(attention).pop(NAME, None)
