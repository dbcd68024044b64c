"""A needle in a haystack: a number in a long text, asked for at its end.

The text is Python's manual in bytes, from any place; a sentence with the number
stands at any depth. The answer's digits are wanted one by one, each after the
right ones before it (Kamradt 2023).
"""

import dataclasses
import functools

import numpy as np

from attention.common.options import option
from train_lib import manual
from train_lib.tasks import task

SENTENCE = b' The key is '


@functools.cache
def haystack():
  """uint8: the text of the manual."""
  documents, _ = manual.read()
  return np.frombuffer(''.join(documents).encode(), np.uint8)


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(512, 'bytes of a row', at_least=32, at_most=250_000)
  digits: int = option(4, 'digits of the number', at_least=1)

  def __post_init__(self):
    super().__post_init__()
    task.fits('length', self.length, 2 * (len(SENTENCE) + self.digits) + 1,
              'the sentence and the question')

  @property
  def vocab_size(self):
    return 256

  @property
  def labels(self):
    return self.digits

  @property
  def chance(self):
    return 1 / 10

  def row(self, random):
    number = ord('0') + random.below(10, self.digits)
    sentence = np.frombuffer(SENTENCE, np.uint8)
    needle = np.concatenate([sentence, number, [ord('.')]])
    # The last digit is a label alone.
    question = np.concatenate([sentence, number[:-1]])
    text, size = haystack(), self.length - len(needle) - len(question)
    start, depth = random.below(len(text) - size), random.below(size + 1)
    hay = text[start:start + size]
    tokens = np.concatenate([hay[:depth], needle, hay[depth:], question])
    return tokens, np.arange(self.length - self.digits, self.length), number

  def show(self, ids):
    return repr(bytes(ids).decode('utf-8', 'replace'))
