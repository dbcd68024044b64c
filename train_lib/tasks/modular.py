"""Arithmetic modulo 5 (Deletang et al. 2022, the Chomsky hierarchy).

An expression of digits with + - *, the product first, and at the `=` its value
is wanted. With brackets, every operation has a pair of its own.
"""

import dataclasses

from attention.common.options import option
from train_lib.tasks import task

MODULUS = 5
SYMBOLS = '01234+-*()='
_PLUS, _MINUS, _TIMES, _OPEN, _CLOSE, _EQUALS = range(MODULUS, len(SYMBOLS))


@dataclasses.dataclass(frozen=True)
class Task(task.Task):
  length: int = option(40, 'tokens of the longest rows, = included', at_least=2)
  shortest: int = option(4, 'tokens of the shortest rows', at_least=2)
  brackets: bool = option(False, 'every operation in brackets')

  def __post_init__(self):
    super().__post_init__()
    task.fits('length', self.length, self.shortest, 'shortest')

  @property
  def vocab_size(self):
    return len(SYMBOLS)

  @property
  def chance(self):
    return 1 / MODULUS

  def row(self, random):
    size = self.shortest - 1 + random.below(self.length - self.shortest + 1)
    make = _bracketed if self.brackets else _flat
    tokens, value = make(random, size)
    return [*tokens, _EQUALS], [len(tokens)], [value]

  def show(self, ids):
    return ''.join(SYMBOLS[i] for i in ids)


def _flat(random, size):
  """(tokens, value) of digits and operators; a - in front of an even size."""
  sign = -1 if size % 2 == 0 else 1
  tokens = [_MINUS] if sign < 0 else []
  digit = random.below(MODULUS)
  tokens.append(digit)
  total, product = 0, sign * digit
  for _ in range((size - 1) // 2):
    operator, digit = _PLUS + random.below(3), random.below(MODULUS)
    tokens += [operator, digit]
    if operator == _TIMES:
      product *= digit
    else:  # What was multiplied so far is one summand.
      total += product
      product = digit if operator == _PLUS else -digit
    total, product = total % MODULUS, product % MODULUS
  return tokens, (total + product) % MODULUS


def _bracketed(random, size):
  """(tokens, value) of an expression of exactly so many tokens."""
  if size >= 5:
    split = 1 + random.below(size - 4)
    left, a = _bracketed(random, split)
    operator = _PLUS + random.below(3)
    right, b = _bracketed(random, size - 3 - split)
    value = {_PLUS: a + b, _MINUS: a - b, _TIMES: a * b}[operator]
    return [_OPEN, *left, operator, *right, _CLOSE], value % MODULUS
  digit = random.below(MODULUS)
  tokens = [_MINUS, digit] if size % 2 == 0 else [digit]
  if size > 2:
    tokens = [_OPEN, *tokens, _CLOSE]
  return tokens, -digit % MODULUS if size % 2 == 0 else digit
