"""Schedules, and what each optimiser does to which parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_lib import optim
from train_lib.state import Skeleton

OPTIMIZERS = ('adamw', 'lion', 'adafactor', 'muon', 'sgd')


@pytest.fixture
def skeleton(config):
  config.update(vocab_size=32, use_flash_lobo=True, max_iters=100)
  return Skeleton(config)


def test_warm_up_then_decay(config):
  config.update(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
  for name, middle in (('constant', 1.0), ('cosine', 0.55), ('linear', 0.55),
                       ('wsd', 1.0)):
    config.lr_schedule = name
    rate = optim.schedule(config)
    assert 0 < rate(0) < rate(5) < rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(middle)
    end = 1.0 if name == 'constant' else 0.1
    assert rate(110) == pytest.approx(end) == pytest.approx(rate(500))


def test_without_warm_up(config):
  config.update(learning_rate=1.0, warmup_iters=0)
  assert optim.schedule(config)(0) == pytest.approx(1.0)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_only_matrices_decay(config, skeleton, name):
  config.update(optimizer=name, weight_decay=0.5, learning_rate=0.1,
                warmup_iters=0, lr_schedule='constant')
  params = skeleton.init(jax.random.key(0))
  tx = optim.build(config, skeleton)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  for name, update in updates.items():
    decayed = skeleton.variables[name].decay
    want = -0.05 * params[name] if decayed else zeros[name]
    np.testing.assert_allclose(update, want, atol=1e-6, err_msg=name)
  undecayed = {n.split('/')[-1] for n, v in skeleton.variables.items()
               if not v.decay}
  assert 'log_sink' in undecayed


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_descends(config, skeleton, name):
  rate = 0.3 if name == 'sgd' else 0.02
  config.update(optimizer=name, learning_rate=rate, warmup_iters=0,
                weight_decay=0.0, grad_clip=0.0, lr_schedule='constant')
  params = skeleton.init(jax.random.key(0))
  target = skeleton.init(jax.random.key(1))
  tx = optim.build(config, skeleton)
  loss = lambda p: sum(
      ((p[n] - target[n]) ** 2).sum() for n in skeleton.names)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value
  state, values = tx.init(params), []
  for _ in range(10):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[-1] < 0.8 * values[0]


def test_muon_orthogonalises_matrices_between_activations(config, skeleton):
  config.update(optimizer='muon', learning_rate=1.0, warmup_iters=0,
                weight_decay=0.0, grad_clip=0.0, lr_schedule='constant')
  params = skeleton.init(jax.random.key(0))
  tx = optim.build(config, skeleton)
  grads = jax.tree.map(
      lambda x: jax.random.normal(jax.random.key(2), x.shape), params)
  updates, _ = tx.update(grads, tx.init(params), params)
  # [layers, N, V, D]: of every layer, a matrix from N V to D.
  out = updates['periods/0/mixer/out/weight']
  values = np.linalg.svd(out.reshape(out.shape[0], 16, 16), compute_uv=False)
  assert values.max() / values.min() < 3  # Random normal: over 10.
  embedding = np.abs(updates['embed/tokens'])
  # Adam's first step is as long everywhere.
  np.testing.assert_allclose(embedding, embedding.mean(), rtol=1e-3)


def test_clipping(config, skeleton):
  config.update(optimizer='sgd', learning_rate=1.0, warmup_iters=0,
                weight_decay=0.0, grad_clip=0.5, lr_schedule='constant')
  params = skeleton.init(jax.random.key(0))
  tx = optim.build(config, skeleton)
  grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
  updates, _ = tx.update(grads, tx.init(params), params)
  assert optax.tree.norm(updates) == pytest.approx(0.5, rel=1e-5)
