"""Running sums whose differences keep their digits.

Of a sum of 32,768 terms float32 has rounded off what tells its neighbours
apart. So a sum comes in two addends, a float32 and what that has lost: what is
wanted of sums is their differences, and those of addends are small and exact.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def running_sum(
    x: Float[Array, 'B T N'],
    before: Float[Array, 'B N 2'],
    starts: Bool[Array, 'B T'] | None = None,
) -> Float[Array, 'B T N 2']:
  """The sum of x over the document up to each step, without its first step.

  Args:
    x: float32.
    before: the sum before the first step, zeros to begin with.
    starts: where a document starts: the sum is zero there. None: nowhere.

  Returns:
    The sum in two addends, the larger one first. It is that one which has a
    gradient: the other one's is zero wherever it exists.
  """
  if starts is None:
    starts = jnp.zeros(x.shape[:2], bool)
  # Chosen, not multiplied: what is not finite ends with its document.
  x = jnp.where(starts[..., None], 0.0, x)
  first = lambda a, b: jnp.concatenate([a[:, None], b], axis=1)
  steps = (jnp.pad(starts, ((0, 0), (1, 0)))[..., None],
           first(before[..., 0], x), first(before[..., 1], jnp.zeros_like(x)))
  _, *addends = jax.lax.associative_scan(_join, steps, axis=1)
  return jnp.stack([a[:, 1:] for a in addends], axis=-1)


def _join(earlier, later):
  """Two stretches of steps as one: (whether a document starts in it, sum)."""
  (began, a, a_rest), (begins, b, b_rest) = earlier, later
  total = a + b
  # What rounding has taken from either (Knuth, 4.2.2, theorem B).
  b_kept = total - a
  lost = (a - (total - b_kept)) + (b - b_kept)
  rest = a_rest + b_rest + jax.lax.stop_gradient(lost)
  return (began | begins, jnp.where(begins, b, total),
          jnp.where(begins, b_rest, rest))
