"""Cross-entropy in parts equals cross-entropy at once."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_lib import loss

B, T, D, VOCAB = 2, 12, 8, 40


def model(head):
  return types.SimpleNamespace(
      vocab_size=VOCAB, logits=lambda x: jnp.einsum('...D,vD->...v', x, head))


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  targets = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
  targets[0, 3:5] = -1
  return (rng.standard_normal((B, T, D)).astype(np.float32),
          rng.standard_normal((VOCAB, D)).astype(np.float32), targets)


@pytest.mark.parametrize('z_loss', [0.0, 0.1])
def test_parts_equal_the_whole(arrays, monkeypatch, z_loss):
  hidden, head, targets = arrays

  def total(hidden, head):
    sums = loss.cross_entropy(
        model(head), hidden, targets, z_loss=z_loss)
    return sums.total, sums[1:]
  # Traced anew for each use: LOGITS_BYTES is read while it is traced.
  compute = lambda *args: jax.jit(jax.value_and_grad(
      total, argnums=(0, 1), has_aux=True))(*args)
  whole = compute(hidden, head)
  monkeypatch.setattr(loss, 'LOGITS_BYTES', B * 4 * VOCAB * 4)
  assert 'scan' in str(jax.make_jaxpr(compute)(hidden, head))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-6), whole,
      compute(hidden, head))
  (_, (plain, correct, count)), _ = whole
  logits = hidden @ head.T
  each = optax.softmax_cross_entropy_with_integer_labels(
      logits, np.maximum(targets, 0))
  np.testing.assert_allclose(plain, each[targets >= 0].sum(), rtol=1e-5)
  assert correct == (logits.argmax(-1) == targets).sum()
  assert count == (targets >= 0).sum() == B * T - 2


def test_no_target_across_documents_or_padding():
  batch = {'tokens': np.array([[5, 6, 7, 8, -1]]),
           'segment_ids': np.array([[1, 1, 2, 2, 2]])}
  inputs, targets, ids = loss.targets_of(batch)
  np.testing.assert_array_equal(inputs, [[5, 6, 7, 8]])
  np.testing.assert_array_equal(targets, [[6, -1, 8, -1]])
  np.testing.assert_array_equal(ids, [[1, 1, 2, 2]])


def test_parts_divide_the_length():
  assert loss._parts(12, loss.LOGITS_BYTES) == 1
  assert loss._parts(12, 2.5 * loss.LOGITS_BYTES) == 3
  assert loss._parts(7, 2 * loss.LOGITS_BYTES) == 7
  assert loss._parts(7, 99 * loss.LOGITS_BYTES) == 7
