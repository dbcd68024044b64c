"""Schedules, and what each optimiser does to which parameter."""

import jax
import numpy as np
import optax
import pytest

from tests.train_lib import runs
from train_lib import optim
from train_lib.state import AbstractModel

OPTIMIZERS = ('adamw', 'lion', 'adafactor', 'muon', 'sgd')


@pytest.fixture(scope='module')
def model():
  return AbstractModel(runs.small('pydoc', vocab_size=32, use_flash_lobo=True))


@pytest.fixture(scope='module')
def params(model):
  return jax.jit(model.init)(jax.random.key(0))


def first_update(tx, params, grads):
  """The updates of a transformation's first step."""
  return jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()


def test_warm_up_then_decay(config):
  config.update(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110,
                lr_decay_iters=None)
  for name, middle in (('constant', 1.0), ('cosine', 0.55), ('linear', 0.55),
                       ('wsd', 1.0)):
    config.lr_schedule = name
    rate = optim.schedule(config)
    assert 0 < rate(0) < rate(5) < rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(middle)
    end = 1.0 if name == 'constant' else 0.1
    assert rate(110) == pytest.approx(end) == pytest.approx(rate(500))


@pytest.mark.parametrize('flags, told', [
    (dict(max_iters=100, warmup_iters=99), None),
    (dict(max_iters=100, warmup_iters=100), 'max_iters (100) is not above'),
    (dict(max_iters=60, warmup_iters=100), 'does not get to its peak'),
    (dict(max_iters=100, warmup_iters=50, lr_decay_iters=50), 'falls at once'),
    (dict(max_iters=100, warmup_iters=50, lr_decay_iters=50,
          lr_schedule='constant'), None)], ids=str)
def test_a_schedule_that_does_not_do_what_it_says(config, flags, told):
  config.update(lr_decay_iters=None)
  config.update(flags)
  notes = optim.notes(config)
  assert len(notes) == (told is not None)
  assert all(told in note for note in notes)


@pytest.mark.parametrize('name', ('constant', 'cosine', 'linear', 'wsd'))
def test_the_table_is_the_schedule(config, name):
  """Longer than the run, and one number at a time but for rounding."""
  config.update(lr_schedule=name, max_iters=1500, warmup_iters=100,
                lr_decay_iters=None, learning_rate=3e-3, min_lr=1e-4)
  table = optim.rates(config)
  assert table.shape == (2048,)
  rate = jax.jit(optim.schedule(config))
  np.testing.assert_allclose(
      table[:1500:7], [rate(i) for i in range(0, 1500, 7)], rtol=1e-6)
  config.max_iters = 3
  assert optim.rates(config).shape == (optim.SHORTEST,)
  config.max_iters = 10 ** 9
  assert optim.rates(config) is None


def test_without_warm_up(config):
  config.update(learning_rate=1.0, warmup_iters=0)
  assert optim.schedule(config)(0) == pytest.approx(1.0)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_only_matrices_decay(config, model, params, name):
  config.update(optimizer=name, weight_decay=0.5, learning_rate=0.1,
                warmup_iters=0, lr_schedule='constant')
  zeros = jax.tree.map(np.zeros_like, params)
  updates = first_update(optim.build(config, model), params, zeros)
  for name, update in updates.items():
    decayed = model.variables[name].decay
    want = -0.05 * params[name] if decayed else zeros[name]
    np.testing.assert_allclose(update, want, atol=1e-6, err_msg=name)
  undecayed = {n.split('/')[-1] for n, v in model.variables.items()
               if not v.decay}
  assert 'log_sink' in undecayed


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_descends(config, model, params, name):
  rate = 0.3 if name == 'sgd' else 0.02
  config.update(optimizer=name, learning_rate=rate, warmup_iters=0,
                weight_decay=0.0, grad_clip=0.0, lr_schedule='constant')
  target = jax.jit(model.init)(jax.random.key(1))
  tx = optim.build(config, model)
  loss = lambda p: sum(((p[n] - target[n]) ** 2).sum() for n in target)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value
  state, values = jax.jit(tx.init)(params), []
  for _ in range(10):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[-1] < 0.8 * values[0]


def test_muon_orthogonalises_matrices_between_activations(
    config, model, params):
  config.update(optimizer='muon', learning_rate=1.0, warmup_iters=0,
                weight_decay=0.0, grad_clip=0.0, lr_schedule='constant')
  rng = np.random.default_rng(2)
  grads = jax.tree.map(
      lambda x: rng.standard_normal(x.shape, np.float32), params)
  updates = first_update(optim.build(config, model), params, grads)
  # [layers, N, V, D]: of every layer, a matrix from N V to D.
  out = updates['periods/0/mixer/out/weight']
  values = np.linalg.svd(out.reshape(out.shape[0], 16, 16), compute_uv=False)
  assert values.max() / values.min() < 3  # Random normal: over 10.
  embedding = np.abs(updates['embed/tokens'])
  # Adam's first step is as long everywhere.
  np.testing.assert_allclose(embedding, embedding.mean(), rtol=1e-3)


def test_clipping(config, model, params):
  config.update(optimizer='sgd', learning_rate=1.0, warmup_iters=0,
                weight_decay=0.0, grad_clip=0.5, lr_schedule='constant')
  grads = jax.tree.map(lambda x: np.full_like(x, 100), params)
  updates = first_update(optim.build(config, model), params, grads)
  assert optax.tree.norm(updates) == pytest.approx(0.5, rel=1e-5)
