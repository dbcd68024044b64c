"""Running sums in two addends, and attention that is biased by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels.flash import flash_attention, reference, xla
from attention.kernels.sums import running_sum
from tests.kernels.measure import relative_rms, same_bits

LONG = 32768
STARTS = np.zeros((2, 40), bool)
STARTS[0, [0, 13, 14, 30]] = STARTS[1, 21] = True


def terms(T, *, mean=-0.7, rows=2):
  """float32 [rows,T,3]: logs of gates."""
  rng = np.random.default_rng(0)
  return np.float32(mean * rng.exponential(size=(rows, T, 3)))


def nothing(rows=2):
  return jnp.zeros((rows, 3, 2))


def defined(x, starts):
  """float64 [B,T,N], step by step."""
  total, sums = np.zeros((x.shape[0], x.shape[2])), []
  for t in range(x.shape[1]):
    total = np.where(starts[:, t, None], 0.0, total + np.float64(x[:, t]))
    sums.append(total)
  return np.stack(sums, 1)


@pytest.mark.parametrize('mean', [-0.01, -0.7, -100.0])
@pytest.mark.parametrize('distance', [1, 100, 10_000])
def test_differences_of_long_sums_keep_their_digits(mean, distance):
  """A float32 of these sums is off by 4e-5, 4e-3 and 0.6."""
  x = terms(LONG, mean=mean, rows=1)
  sums = np.asarray(jax.jit(running_sum)(x, nothing(1)))
  parts = sums[:, distance:] - sums[:, :-distance]
  exact = np.cumsum(np.float64(x), 1)
  want = exact[:, distance:] - exact[:, :-distance]
  np.testing.assert_allclose(
      parts[..., 0] + parts[..., 1], want, rtol=3e-7, atol=3e-7 * abs(mean))


def test_documents_start_anew_and_gradients_end_with_them():
  x, starts = terms(40), jnp.asarray(STARTS)
  weights = np.float32(np.random.default_rng(1).standard_normal(x.shape))
  sums, pull = jax.vjp(lambda x: running_sum(x, nothing(), starts), x)
  np.testing.assert_allclose(sums.sum(-1), defined(x, STARTS), rtol=1e-6)
  # Each addend is given the gradient of the number.
  gradient, = pull(jnp.stack([weights, weights], -1))
  later = np.cumsum(STARTS, 1)
  same = (later[:, :, None] == later[:, None]) & np.triu(np.ones((40, 40)), 0
                                                         ).astype(bool)
  want = np.einsum('BST,BTN->BSN', same, np.float64(weights))
  np.testing.assert_allclose(
      gradient, np.where(STARTS[..., None], 0.0, want), atol=2e-5)


@pytest.mark.parametrize('garbage', [-1e30, -np.inf, np.nan])
def test_documents_are_isolated_bit_for_bit(garbage):
  @jax.jit
  def both(x):
    sums, pull = jax.vjp(
        lambda x: running_sum(x, nothing(), jnp.asarray(STARTS)), x)
    return sums, pull(jnp.where(jnp.isfinite(sums), jnp.sin(sums), jnp.nan))[0]

  x = terms(40)
  before, after = both(x), both(jnp.asarray(x).at[0, 14:30].set(garbage))
  outside = np.r_[0:14, 30:40]
  for one, other in zip(before, after):
    assert same_bits(one[0, outside], other[0, outside])
    assert same_bits(one[1], other[1])


def test_the_sum_before_goes_on():
  x, starts = terms(40), jnp.asarray(STARTS)
  state, parts = nothing(), []
  for cut in (slice(0, 20), slice(20, 21), slice(21, 40)):
    parts.append(running_sum(x[:, cut], state, starts[:, cut]))
    state = parts[-1][:, -1]
  np.testing.assert_allclose(
      jnp.concatenate(parts, 1).sum(-1), defined(x, STARTS), rtol=1e-6)


def forgetting(attend, dtype, sum_of):
  """(out, its gradient of the logs of the gates) of the last of many queries.

  Args:
    attend: flash_attention or its reference.
    dtype: of q, k and v.
    sum_of: function of logs [B,S,N], to their sums in addends.
  """
  T, S, H = 128, LONG, 16
  rng = np.random.default_rng(2)
  draw = lambda n: jnp.asarray(
      rng.standard_normal((1, n, 1, H)), jnp.bfloat16).astype(dtype)
  q, k, v, weights = draw(T), draw(S), draw(S), draw(T)

  def outputs(x):
    sums = sum_of(x)
    return attend(q, k, v, scale=0.25, q_offset=S - T,
                  bias=(sums[:, -T:], sums))[0]

  # Slowly forgotten: some thousand keys have a part in each query.
  x = terms(S, mean=-1e-3, rows=1)[..., :1]
  x[:, :S // 2] = 50 * x[:, :S // 2]
  out, pull = jax.jit(lambda x: jax.vjp(outputs, x))(x.astype(
      jnp.promote_types(dtype, jnp.float32)))
  return out, pull(weights)[0]


@functools.cache
def exact_forgetting():
  with jax.enable_x64(True):
    return jax.device_get(forgetting(
        reference.attention, jnp.float64,
        lambda x: jnp.cumsum(x, 1)[..., None]))


@pytest.mark.parametrize('dtype, tolerances', [
    (jnp.float32, (1e-6, 1e-5)), (jnp.bfloat16, (4e-3, 1e-2))],
    ids=['float32', 'bfloat16'])
def test_forgetting_over_32k_tokens(dtype, tolerances, monkeypatch):
  """Of the same numbers, which bfloat16 can hold: it rounds what it makes."""
  monkeypatch.setattr(xla, 'ROWS', 64)
  got = forgetting(
      flash_attention, dtype, lambda x: running_sum(x, nothing(1)[:, :1]))
  for a, b, tolerance in zip(got, exact_forgetting(), tolerances, strict=True):
    assert relative_rms(a, b) <= tolerance
