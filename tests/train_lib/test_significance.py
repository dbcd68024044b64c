"""The tests of differences, against SciPy's and the definition."""

import numpy as np
import pytest
from scipy import stats

from train_lib import significance


@pytest.mark.parametrize('sizes', [(2, 2), (3, 5), (10, 3)])
def test_welch_is_scipys(sizes):
  rng = np.random.default_rng(0)
  for shift in (0.0, 0.5, 5.0):
    a, b = rng.normal(size=sizes[0]), rng.normal(shift, 3.0, size=sizes[1])
    wanted = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert significance.welch([*a], [*b]) == pytest.approx(wanted, rel=1e-9)


def test_welch_of_too_little():
  assert significance.welch([1.0], [2.0, 3.0]) is None
  assert significance.welch([1.0, 1.0], [1.0, 1.0]) == 1.0
  assert significance.welch([1.0, 1.0], [2.0, 2.0]) == 0.0


def test_holm():
  """Holm's own procedure: the smallest times n, the next times n - 1, ..."""
  assert significance.holm([0.04, 0.01, 0.03]) == pytest.approx(
      [0.06, 0.03, 0.06])
  assert significance.holm([0.5, 0.9]) == [1.0, 1.0]
  assert significance.holm([]) == []


def test_noise_is_rarely_resolved():
  """Of tables of noise, at most about LEVEL have any difference resolved."""
  rng = np.random.default_rng(1)
  wrong = 0
  for _ in range(400):
    scores = rng.normal(size=(4, 5))
    found = significance.holm([
        significance.welch([*scores[i]], [*scores[j]])
        for i in range(4) for j in range(i)])
    wrong += min(found) < significance.LEVEL
  assert wrong / 400 < 0.07
