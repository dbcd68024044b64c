"""The head's softcap, wherever logits are used: loss, samples, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.common import options
from configs import default
from model import sample
from tests.attention import cases
from train_lib import loss
from train_lib.state import AbstractModel

CAP = 0.7
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 13)).astype(np.int32)


def build(**flags):
  abstract = AbstractModel(cases.config(
      attention_variant='linear', init_std=0.5, **flags))
  return abstract.merge(jax.jit(abstract.init)(jax.random.key(0)))


@jax.jit
def mean_loss(model, scale=1.0):
  hidden, _ = model.hidden(TOKENS[:, :-1])
  sums = loss.cross_entropy(model, scale * hidden, TOKENS[:, 1:])
  return sums.total / sums.number


@pytest.mark.parametrize('tied', [True, False])
def test_the_loss_is_that_of_capped_logits(tied, monkeypatch):
  raw, _ = build(tie_embeddings=tied)(TOKENS[:, :-1])
  capped = CAP * np.tanh(np.asarray(raw, np.float64) / CAP)
  assert np.abs(raw).max() > 2 * CAP
  model = build(tie_embeddings=tied, final_logit_softcapping=CAP)
  np.testing.assert_allclose(model(TOKENS[:, :-1])[0], capped, atol=1e-5)
  picked = np.take_along_axis(capped, TOKENS[:, 1:, None], -1)[..., 0]
  want = (np.log(np.exp(capped).sum(-1)) - picked).mean()
  np.testing.assert_allclose(mean_loss(model), want, rtol=1e-5)
  # In parts, whose logits the backward pass makes again.
  whole = jax.grad(mean_loss)(model)
  monkeypatch.setattr(loss, 'LOGITS_BYTES', 2 * 4 * 32 * 4)
  jax.clear_caches()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
               whole, jax.grad(mean_loss)(model))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_cap_bounds_what_would_overflow(dtype):
  model = build(final_logit_softcapping=30.0, compute_dtype=dtype)
  logits = model.logits(jnp.full((1, 32), 1e30, dtype))
  assert logits.dtype == jnp.float32
  assert np.abs(logits).max() == 30
  for scale in (0.0, 1e30):
    slopes = jax.grad(mean_loss)(model, scale)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes))


def test_samples_are_drawn_from_capped_logits():
  """Next to no cap at all, all tokens are as likely."""
  draw = lambda model: np.concatenate(list(sample.generate(
      model, [[3], [1, 2]], max_new_tokens=12, key=jax.random.key(0))), 1)
  flat = build(tie_embeddings=False)
  flat.embed.head[...] = jnp.zeros_like(flat.embed.head[...])
  capped = build(tie_embeddings=False, final_logit_softcapping=1e-6)
  np.testing.assert_array_equal(draw(capped), draw(flat))
  assert (draw(build(tie_embeddings=False)) != draw(flat)).any()


def test_values_of_the_flag():
  field = default.fields()['final_logit_softcapping']
  assert options.convert(field, None) == 30  # Gemma 2's.
  assert options.convert(field, '0') is None
  np.testing.assert_array_equal(
      build(final_logit_softcapping=0.0)(TOKENS)[0], build()(TOKENS)[0])
  with pytest.raises(ValueError, match=r'final_logit_softcapping \(-1.0\)'):
    build(final_logit_softcapping=-1.0)
