"""The yardstick that every run prints."""

import types

import numpy as np
import pytest

from train_lib import bigram


def dataset(train, val, vocab_size):
  return types.SimpleNamespace(
      train=np.array(train, np.uint8), val=np.array(val, np.uint8),
      vocab_size=vocab_size)


def test_entropy():
  rng = np.random.default_rng(0)
  uniform = rng.integers(0, 4, 200_000).astype(np.uint8)
  assert bigram.entropy(uniform) == pytest.approx(np.log(4), abs=1e-3)
  assert bigram.entropy(np.arange(1000) % 7) == pytest.approx(0, abs=1e-9)
  # 0 0 1 again and again: 0 is followed by 0 or 1 alike, 1 always by 0.
  chain = np.tile([0, 0, 1], 10_000)
  assert bigram.entropy(chain) == pytest.approx(2 / 3 * np.log(2), abs=1e-3)
  with pytest.raises(ValueError, match='no bigram'):
    bigram.entropy(np.array([1], np.uint8))


def test_a_table_of_pairs():
  # After 0 comes 1 three times and 2 once.
  train = [0, 1, 0, 1, 0, 2, 0, 1]
  small = dataset(train, [0, 1], 3)
  assert bigram.loss(small, prior=1e-9) == pytest.approx(-np.log(3 / 4))
  assert bigram.loss(small, prior=1.0) == pytest.approx(
      -np.log((3 + 1) / (4 + 3)))
  unseen = dataset(train, [2, 2], 3)
  assert bigram.loss(unseen, prior=0.5) == pytest.approx(
      -np.log(0.5 / (1 + 1.5)))


def test_noise_cannot_be_learnt():
  rng = np.random.default_rng(0)
  noise = dataset(rng.integers(0, 8, 10**5), rng.integers(0, 8, 10**4), 8)
  assert bigram.loss(noise) == pytest.approx(np.log(8), abs=0.01)
