"""What each task says, slowly and read off a row alone.

A statement takes a Task and the tokens of a row, and gives {place: label}: what
a reader who knows the rules would write there. None of it shares code with the
generators.
"""

import itertools
import re

# Options small enough for a slow check, and odd where they can be.
OPTIONS = {
    'copy': 'length=7, vocab=5',
    'induction': 'length=9, vocab=4',
    'modular': 'length=13, shortest=2',
    'mqar': 'length=41, pairs=5, vocab=31, power=0.5',
    'needle': 'length=101, digits=3',
    'noisy_recall': 'length=37, vocab=6, noise_vocab=3, noise=0.3',
    'parity': 'length=9, shortest=2',
    's5': 'length=6',
    'selective_copy': 'length=20, copies=4, vocab=6',
}


def copy(task, tokens):
  middle = len(tokens) // 2
  assert set(tokens[middle:]) == {0} and 0 not in tokens[:middle]
  return {middle + i: tokens[i] for i in range(middle)}


def induction(task, tokens):
  special = task.vocab - 1
  first = tokens.index(special)
  assert [i for i, t in enumerate(tokens) if t == special] == [
      first, len(tokens) - 1]
  return {len(tokens) - 1: tokens[first + 1]}


def modular(task, tokens):
  text = ''.join('01234+-*()='[t] for t in tokens)
  assert text[-1] == '=' and '=' not in text[:-1]
  assert ('(' in text) <= task.brackets
  assert not re.search(r'\d\d', text)
  return {len(tokens) - 1: eval(text[:-1]) % 5}  # Python's own arithmetic.


def mqar(task, tokens):
  value, labels = {}, {}
  for i in range(task.pairs):
    key = tokens[2 * i]
    assert 1 <= key < task.vocab // 2 <= tokens[2 * i + 1]
    assert key not in value
    value[key] = tokens[2 * i + 1]
  return labels, value


def needle(task, tokens):
  text = bytes(tokens).decode('latin-1')
  digits = re.search(rf' The key is (\d{{{task.digits}}})\.', text).group(1)
  assert text.endswith(' The key is ' + digits[:-1])
  start = len(text) - task.digits
  return {start + i: ord(digit) for i, digit in enumerate(digits)}


def noisy_recall(task, tokens):
  labels, value, i = {}, {}, 0
  while i < len(tokens):
    if tokens[i] >= task.vocab:
      i += 1
      continue
    key, after = tokens[i:i + 2]
    assert key < task.vocab // 2 <= after < task.vocab
    if key in value:
      labels[i] = value[key]
      assert after == value[key]
    value[key] = after
    i += 2
  return labels


def parity(task, tokens):
  odd = False
  for bit in tokens:
    odd ^= bit == 1
  return {len(tokens) - 1: int(odd)}


def s5(task, tokens):
  every = list(itertools.permutations('abcde'))
  things, labels = 'abcde', {}
  for i, token in enumerate(tokens):
    # A permutation puts letter x where 'abcde' has x.
    rename = dict(zip('abcde', every[token]))
    things = ''.join(rename[x] for x in things)
    labels[i] = every.index(tuple(things))
  return labels


def selective_copy(task, tokens):
  marks = [i for i, token in enumerate(tokens) if token == 1]
  wanted = [token for token in tokens if token > 1]
  assert marks == list(range(task.length, task.length + task.copies))
  return dict(zip(marks, wanted, strict=True))
