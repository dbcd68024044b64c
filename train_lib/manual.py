"""The default corpus: Python's own manual, as all Pythons have it.

The text of `pydoc_data.topics` changes with every release. manual.txt lists the
paragraphs that 3.11.7, 3.12.1 and 3.13.0 share, each once, so that none of the
validation split is in the training split too: by the first 32 bits of their
SHA-256, in the order of the text, with an empty line after each topic. What is
picked by it is one corpus on all of them.
"""

import hashlib
import pathlib
import pydoc_data.topics
import re

LIST = pathlib.Path(__file__).with_suffix('.txt')
SHA256 = (
    '7fe2025875481869e902fba8f6dc1668583fb7bc22c2cb8bcbc7f8fd9f80f36f')


def paragraphs(text):
  """{hash: paragraph} of a text, in its order."""
  found = [p.strip('\n') for p in re.split(r'\n(?:[ \t]*\n)+', text)]
  return {hashlib.sha256(p.encode()).hexdigest()[:8]: p for p in found if p}


def read():
  """(documents, notes): the topics, and a line if this Python lacks any."""
  known = {}
  for text in pydoc_data.topics.topics.values():
    known.update(paragraphs(text))
  listed = [topic.split() for topic in LIST.read_text().split('\n\n')]
  documents = ['\n\n'.join(known[mark] for mark in topic if mark in known)
               for topic in listed]
  total = sum(map(len, listed))
  lacking = total - sum(mark in known for topic in listed for mark in topic)
  notes = [f'this Python lacks {lacking} of the {total} paragraphs of pydoc: '
           'losses are not those of other versions'] if lacking else []
  return [document + '\n' for document in documents if document], notes
