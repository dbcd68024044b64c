"""Retention against its paper, in the parallel form, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from attention import retention
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import cases, oracles
from tests.attention.cases import close

T = 12


def oracle(mixer, x, *, positions, segment_ids):
  """Sun et al. 2023, equations 5 and 8: all pairs, and the decays between.

  Equation 7 of YOCO (Sun et al. 2024) where the token sets them.
  """
  del segment_ids  # A document starts where its position is 0.
  options, (N, H, _) = mixer.options, mixer.shape
  q, k = (oracles.rotate(oracles.dense(e, x), positions, options.rope_base)
          for e in (mixer.query, mixer.key))
  v, gate = oracles.dense(mixer.value, x), oracles.dense(mixer.gate, x)
  heads = np.arange(N)
  a = np.broadcast_to({
      'fixed': lambda: 1 - 2.0 ** (-5 - heads),
      'lightning': lambda: np.exp(-2.0 ** (-8 / N * (heads + 1))),
      'data': lambda: (1 + np.exp(-oracles.dense(mixer.decay, x))) ** (-1 / 16),
  }[options.retention_decay]() ** options.retention_decay_power, q.shape[:3])
  y = np.zeros(v.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    seen = np.arange(t - positions[b, t], t + 1)
    D = np.append(np.cumprod(a[b, seen, n][:0:-1])[::-1], 1.0)  # s + 1 to t.
    y[b, t, n] = (D * (k[b, seen, n] @ q[b, t, n])) @ v[b, seen, n] / H ** 0.5
  y = oracles.rms(y, 1e-5) * gate / (1 + np.exp(-gate))
  return oracles.dense(mixer.out, y)


def build(**flags):
  return attention.build(
      'retention', cases.config(attention_variant='retention', **flags),
      rngs=nnx.Rngs(0))


def gated(bias, **flags):
  """With the same gate for every token."""
  mixer = build(retention_decay='data', **flags)
  mixer.decay.weight[...] = jnp.zeros_like(mixer.decay.weight[...])
  mixer.decay.bias[...] = jnp.full_like(mixer.decay.bias[...], bias)
  return mixer


def test_decays_are_the_published_ones():
  forgotten = -np.expm1(np.float64(retention.log_decays('fixed', 8)))
  np.testing.assert_allclose(forgotten, 0.5 ** np.arange(5, 13), rtol=1e-6)
  np.testing.assert_allclose(
      retention.log_decays('lightning', 8), -0.5 ** np.arange(1, 9), rtol=1e-6)
  assert (retention.log_decays('fixed', 64) < 0).all()


def test_open_gates_are_no_decay():
  x = cases.inputs(T)
  close(cases.plain(gated(1e4), x),
        cases.plain(gated(0.0, retention_decay_power=0.0), x), 1e-6)


def test_closed_gates_leave_each_token_alone():
  x = cases.inputs(T)
  alone = Context(0 * cases.counted(x), cases.counted(x))
  mixer = gated(-1e4)
  close(cases.plain(mixer, x), mixer(x, alone)[0])


@pytest.mark.parametrize('bias', [-1e4, -100.0, 0.0, 1e4])
def test_gates_at_their_ends(bias):
  """With equal keys and queries of one size throughout."""
  mixer = gated(bias)
  for e in (mixer.query, mixer.key):
    e.weight[...] = jnp.broadcast_to(e.weight[...][:, :1], e.weight.shape)
  x = jnp.broadcast_to(cases.inputs(1), (2, 100, 32))
  loss = lambda mixer, x: (cases.plain(mixer, x) ** 2).sum()
  value, gradients = jax.value_and_grad(loss, (0, 1))(mixer, x)
  for leaf in jax.tree.leaves((value, gradients)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize('decay', ['fixed', 'data'])
def test_many_tokens_in_bfloat16(decay):
  """The state is float32: 32k tokens are as far from float32 as a few are."""
  def outputs(dtype, x):
    y, _ = build(retention_decay=decay, compute_dtype=dtype)(
        x.astype(dtype), Context(cases.counted(x)))
    return np.asarray(y[:, -64:], np.float64)
  x = jnp.asarray(np.random.default_rng(0).standard_normal(
      (1, 32_768, cases.MODEL['n_embd'])), jnp.float32)
  want, got = (outputs(dtype, x) for dtype in ('float32', 'bfloat16'))
  rms = lambda a: np.sqrt((a ** 2).mean())
  assert rms(got - want) < 0.03 * rms(want)


@pytest.mark.parametrize('decay', ['fixed', 'data'])
def test_a_mesh_changes_nothing(decay):
  mixer, x = build(retention_decay=decay), cases.inputs(T)
  ids = jnp.asarray([[1] * 5 + [2] * 7] * 2)
  mesh = jax.make_mesh((2, 1, 4), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)

  def everything(mesh):
    def loss(mixer, x, state):
      y, state = mixer(
          x, Context(segment_positions(ids), ids, mesh=mesh), state)
      return (y ** 3).sum(), (y, state)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        mixer, x, mixer.init_state(2, T) + 0.1)

  jax.tree.map(lambda got, want: close(got, want, 1e-4),
               everything(mesh), everything(None))


def test_the_state_is_of_constant_size_and_in_float32():
  mixer, x = build(compute_dtype='bfloat16'), cases.inputs(T)
  short, long = (mixer.init_state(2, n) for n in (1, 1 << 20))
  _, after = mixer(
      x.astype(jnp.bfloat16), Context(cases.counted(x)), short)
  for state in (short, long, after):
    assert state.shape == (2, 4, 8, 16) and state.dtype == jnp.float32


def test_every_layer_of_a_list_may_decay_less():
  config = cases.config(attention_list=(
      'retention(retention_decay=lightning)',
      'retention(retention_decay=lightning, retention_decay_power=0.5)'))
  attention.check(config)
  first, last = (attention.build(layer, config, rngs=nnx.Rngs(0))
                 for layer in attention.layers(config))
  x = cases.inputs(T)
  assert np.abs(cases.plain(first, x) - cases.plain(last, x)).max() > 1e-3


@pytest.mark.parametrize('decay', ['fixed', 'data'])
def test_flops_are_those_of_a_compiled_step(decay):
  mixer = build(retention_decay=decay, n_embd=128)
  x, state = jnp.zeros((1, 1, 128)), mixer.init_state(1, 1)
  measured = jax.jit(lambda mixer, x, state: mixer(
      x, Context(jnp.zeros((1, 1), int)), state)).lower(
          mixer, x, state).compile().cost_analysis()
  assert mixer.flops(1) == mixer.flops(1 << 20)
  assert 0.8 < mixer.flops(1) / measured['flops'] <= 1
