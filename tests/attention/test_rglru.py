"""Griffin's recurrent block against its paper, step by step in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from attention import rglru
from model.sharding import Context
from tests.attention import cases, oracles

WIDTH, HEADS = 32, 4


def oracle(mixer, x, *, positions, segment_ids):
  """De et al. 2024, equations 1 to 4 and figure 2, one channel at a time."""
  del segment_ids  # A document starts where its position is 0.
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  u, z = (oracles.dense(e, x) for e in (mixer.input, mixer.gate))
  taps = oracles.float64(mixer.conv)
  decay = np.log1p(np.exp(oracles.float64(mixer.Lambda)))
  h, y = np.zeros_like(u), np.zeros_like(u)
  for b, t in np.ndindex(*u.shape[:2]):
    place = positions[b, t]
    seen = oracles.float64(mixer.conv_bias) + sum(
        taps[-1 - i] * u[b, t - i] for i in range(min(len(taps), place + 1)))
    r, i = (sigmoid(np.concatenate([
        head @ w + bias for head, w, bias in zip(
            np.split(seen, len(weight)), weight, oracles.float64(gate.bias))]))
        for gate, weight in ((g, oracles.float64(g.weight))
                             for g in (mixer.r, mixer.i)))
    a = np.exp(-8 * decay * r)
    root = np.sqrt(1 - a * a) if place else 1.0
    h[b, t] = root * i * seen + (a * h[b, t - 1] if place else 0.0)
    gelu = z[b, t] * (1 + np.tanh((2 / np.pi) ** 0.5 * (
        z[b, t] + 0.044715 * z[b, t] ** 3))) / 2
    y[b, t] = h[b, t] * gelu
  return oracles.dense(mixer.out, y)


def build(**flags):
  return attention.build(
      'rglru', cases.config(attention_variant='rglru', **flags),
      rngs=nnx.Rngs(0))


def test_decays_start_where_the_paper_has_them():
  a = np.exp(-rglru.C * jax.nn.softplus(build(n_embd=4096).Lambda[...]))
  assert rglru.DECAYS[0] <= a.min() < 0.905 and 0.99 < a.max() <= 1
  assert abs(a.mean() - np.mean(rglru.DECAYS)) < 5e-3


@pytest.mark.parametrize('bias', [-200.0, -30.0, 0.0, 200.0])
def test_gates_at_their_ends(bias):
  """r -> 0 keeps everything and takes in nothing: the root has no slope."""
  mixer, x = build(), cases.inputs(12)
  mixer.r.bias[...] = jnp.full_like(mixer.r.bias[...], bias)
  loss = lambda mixer, x: (cases.plain(mixer, x) ** 2).sum()
  value, gradients = jax.value_and_grad(loss, (0, 1))(mixer, x)
  for leaf in jax.tree.leaves((value, gradients)):
    assert np.isfinite(leaf).all()


def test_many_tokens_in_bfloat16():
  """The state is float32: 32k tokens are as far from float32 as a few are."""
  def outputs(dtype, x):
    y, _ = build(compute_dtype=dtype)(
        x.astype(dtype), Context(cases.counted(x)))
    return np.asarray(y[:, -64:], np.float64)
  x = jnp.asarray(np.random.default_rng(0).standard_normal(
      (1, 32_768, WIDTH)), jnp.float32)
  want, got = (outputs(dtype, x) for dtype in ('float32', 'bfloat16'))
  rms = lambda a: np.sqrt((a ** 2).mean())
  assert rms(got - want) < 0.02 * rms(want)


def test_heads_must_divide_the_width():
  with pytest.raises(ValueError, match=r'n_head \(4\) must divide rglru_width'):
    build(rglru_width=30)
