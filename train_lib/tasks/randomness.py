"""Random numbers that are the same in every NumPy, on every machine."""

import numpy as np

TRAINING, VALIDATION = 0, 1


class Random:
  """The numbers of one row.

  Args:
    seed: of the run.
    step: of the row, or 0 where rows do not belong to a step.
    row: its number.
    split: TRAINING or VALIDATION.
  """

  def __init__(self, *, seed, step, row, split):
    # The first word of the counter counts the numbers that are drawn.
    self._bits = np.random.Philox(key=seed, counter=[0, row, split, step])

  def below(self, n, size=None):
    """int64 [size] or one int, uniform from 0 to n - 1."""
    # Raw bits, as Generator promises no fixed stream. n is far below 2^64.
    drawn = self._bits.random_raw(size) % (
        n if size is None else np.uint64(n))
    return int(drawn) if size is None else drawn.astype(np.int64)

  def uniform(self, size=None):
    """float64 [size], more than 0 and less than 1."""
    return (self._bits.random_raw(size) // 2 ** 12 + 0.5) * 2.0 ** -52

  def distinct(self, n, size, weights=None):
    """int64 [size], different numbers from 0 to n - 1, drawn one by one.

    Args:
      weights: float [n], their chances to be the next one; none: equal.
    """
    # The first arrivals of Poisson processes of these rates.
    times = -np.log(self.uniform(n))
    return np.argsort(times if weights is None else times / weights,
                      kind='stable')[:size]
