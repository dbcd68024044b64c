"""The default corpus is the same on every Python that is here."""

import hashlib
import pathlib
import pydoc_data.topics
import subprocess
import sys

import pytest

from train_lib import manual

FOLDER = pathlib.Path(manual.__file__).parent
PYTHONS = [sys.executable, *map(str, sorted(
    (pathlib.Path.home() / '.pyenv/versions').glob('3.1[1-9].*/bin/python')))]
READ = """
import hashlib, sys
sys.dont_write_bytecode = True
sys.path.insert(0, {folder!r})
import manual
documents, notes = manual.read()
print(hashlib.sha256(''.join(documents).encode()).hexdigest(), *notes)
"""


@pytest.mark.parametrize('python', PYTHONS)
def test_every_python_reads_the_same(python):
  done = subprocess.run(
      [python, '-c', READ.format(folder=str(FOLDER))], text=True,
      capture_output=True, check=True)
  assert done.stdout.split() == [manual.SHA256]


def test_every_paragraph_is_there_once():
  documents, notes = manual.read()
  found = [p for text in documents for p in manual.paragraphs(text)]
  assert len(found) == len(set(found)) == 1883 and not notes
  assert sum(map(len, documents)) == 313597


def test_what_a_python_lacks_is_told(monkeypatch):
  topics = dict(pydoc_data.topics.topics)
  for name in ('assert', 'lambda'):
    topics[name] = 'This was rewritten.'
  monkeypatch.setattr(pydoc_data.topics, 'topics', topics)
  documents, notes = manual.read()
  assert len(notes) == 1 and 'of the 1883 paragraphs of pydoc' in notes[0]
  text = ''.join(documents)
  assert 'This was rewritten.' not in text
  assert hashlib.sha256(text.encode()).hexdigest() != manual.SHA256
