"""Whether a difference between two variants is more than that between seeds."""

import itertools
import math
import statistics

from scipy import special

LEVEL = 0.05


def welch(first, second):
  """Welch's t-test of two samples of unequal variance.

  Args:
    first, second: scores, one a seed.

  Returns:
    The two-sided p: how likely means so far apart are if both samples are of
    one mean. None if a sample has fewer than two values.
  """
  if min(len(first), len(second)) < 2:
    return None
  parts = [statistics.variance(x) / len(x) for x in (first, second)]
  apart = abs(statistics.fmean(first) - statistics.fmean(second))
  if not sum(parts):  # Every seed gives the same.
    return float(apart == 0)
  # Welch and Satterthwaite's degrees of freedom.
  freedom = sum(parts) ** 2 / sum(
      part ** 2 / (len(x) - 1) for part, x in zip(parts, (first, second)))
  return float(2 * special.stdtr(freedom, -apart / math.sqrt(sum(parts))))


def holm(values):
  """The p values of several tests, corrected for their number (Holm 1979).

  Below LEVEL they say of all tests at once, with that chance of any error,
  which differences are real.
  """
  order = sorted(range(len(values)), key=values.__getitem__)
  raised = [min(1.0, values[i] * (len(values) - rank))
            for rank, i in enumerate(order)]
  corrected = dict(zip(order, itertools.accumulate(raised, max)))
  return [corrected[i] for i in range(len(values))]
