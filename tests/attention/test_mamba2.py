"""Mamba-2 against its paper, as one matrix of all pairs, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import cases, oracles
from tests.attention.cases import close

T = 12


def silu(x):
  return x / (1 + np.exp(-x))


def conv(x, taps, bias, positions):
  """Of x [B,T,channels], no further back than a document goes."""
  y = np.zeros_like(x) + bias
  for b, t in np.ndindex(x.shape[:2]):
    for i in range(min(len(taps), positions[b, t] + 1)):
      y[b, t] += taps[-1 - i] * x[b, t - i]
  return silu(y)


def oracle(mixer, x, *, positions, segment_ids):
  """Dao & Gu 2024, equations 3 and 6: y = (L * C B^T) x, document by document.

  In the block of figure 6.
  """
  del segment_ids  # A document starts where its position is 0.
  float64, options = oracles.float64, mixer.options
  _, J, M, N, V = mixer.shape
  z = oracles.dense(mixer.gate, x)
  selected = oracles.dense(mixer.select, x)
  x = conv(oracles.dense(mixer.input, x).reshape(*x.shape[:2], N * V),
           float64(mixer.conv), float64(mixer.conv_bias), positions)
  B_and_C = conv(selected[..., :-N], float64(mixer.select_conv),
                 float64(mixer.select_conv_bias), positions)
  x = x.reshape(z.shape)
  B, C = np.split(B_and_C, 2, -1)
  dt = np.log1p(np.exp(selected[..., -N:] + float64(mixer.dt_bias)))
  dt = np.maximum(dt, options.mamba2_dt_at_least)
  if options.mamba2_dt_at_most is not None:
    dt = np.minimum(dt, options.mamba2_dt_at_most)
  A = -np.exp(float64(mixer.A_log))
  y = np.zeros_like(x)
  for b, t, n in np.ndindex(x.shape[:3]):
    group = slice(n // (N // J) * M, (n // (N // J) + 1) * M)
    seen = np.arange(t - positions[b, t], t + 1)
    steps = dt[b, seen, n]
    later = np.append(np.cumsum(steps[:0:-1])[::-1], 0.0)  # s + 1 to t.
    weights = np.exp(A[n] * later) * (B[b, seen, group] @ C[b, t, group])
    y[b, t, n] = float64(mixer.D)[n] * x[b, t, n] + (
        weights * steps) @ x[b, seen, n]
  y = (y * silu(z)).reshape(*y.shape[:2], J, -1)
  y = oracles.rms(y, 1e-5).reshape(z.shape) * float64(mixer.norm_weight)
  return oracles.dense(mixer.out, y)


def build(**flags):
  return attention.build(
      'mamba2', cases.config(attention_variant='mamba2', **flags),
      rngs=nnx.Rngs(0))


def step_sizes(mixer):
  return np.log1p(np.exp(oracles.float64(mixer.dt_bias)))


def test_initial_parameters():
  mixer = build(n_embd=512, n_head=256)
  dt, A = step_sizes(mixer), np.exp(mixer.A_log[...])
  assert 1e-3 * 0.999 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1001
  assert np.log(dt).mean() == pytest.approx(np.log(1e-2), abs=0.2)
  assert 1 <= A.min() < 1.2 and 15.8 < A.max() <= 16
  assert A.mean() == pytest.approx(8.5, abs=0.5)
  np.testing.assert_array_equal(mixer.D[...], np.ones(512))


def test_what_has_weight_decay():
  parameters = nnx.to_flat_state(nnx.state(build(bias=True), nnx.Param))
  decayed = {'/'.join(path) for path, p in parameters if p.decay}
  dense = {'input', 'gate', 'select', 'out'}
  assert decayed == {f'{name}/weight' for name in dense} | {
      'conv', 'select_conv'}


@pytest.mark.parametrize('bias', [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize('limit', [None, 0.1])
def test_step_sizes_at_their_ends(bias, limit):
  """Decays to 1 and to 0, with equal tokens throughout."""
  mixer = build(mamba2_dt_at_most=limit)
  mixer.dt_bias[...] = jnp.full_like(mixer.dt_bias[...], bias)
  x = jnp.broadcast_to(cases.inputs(1), (2, 100, 32))
  loss = lambda mixer, x: (cases.plain(mixer, x) ** 2).sum()
  value, gradients = jax.value_and_grad(loss, (0, 1))(mixer, x)
  for leaf in jax.tree.leaves((value, gradients)):
    assert np.isfinite(leaf).all()


def test_without_steps_only_the_skip_is_left():
  mixer, x = build(mamba2_conv_kernel_size=1), cases.inputs(T)
  mixer.dt_bias[...] = jnp.full_like(mixer.dt_bias[...], -1e4)
  alone = Context(0 * cases.counted(x), cases.counted(x))
  close(cases.plain(mixer, x), mixer(x, alone)[0], 1e-6)


def test_groups_of_one_head_share_nothing():
  """Two groups with the same B and C are one, but for the norm."""
  one, two = build(mamba2_n_groups=1), build(mamba2_n_groups=2)
  M, N = 64, 8
  weight = np.asarray(one.select.weight[...])
  B, C, dt = np.split(weight, [M, 2 * M], 1)
  two.select.weight[...] = jnp.concatenate([B, B, C, C, dt], 1)
  taps = np.split(np.asarray(one.select_conv[...]), 2, 1)
  two.select_conv[...] = jnp.concatenate([taps[0]] * 2 + [taps[1]] * 2, 1)
  bias = np.split(np.asarray(one.select_conv_bias[...]), 2)
  two.select_conv_bias[...] = jnp.concatenate([bias[0]] * 2 + [bias[1]] * 2)
  assert dt.shape[1] == N
  states = []
  for mixer in (one, two):
    for name in ('input', 'gate'):
      getattr(mixer, name).weight[...] = getattr(one, name).weight[...]
    mixer.conv[...], mixer.conv_bias[...] = one.conv[...], one.conv_bias[...]
    mixer.A_log[...], mixer.dt_bias[...] = one.A_log[...], one.dt_bias[...]
    x = cases.inputs(T)
    states.append(mixer(x, Context(cases.counted(x)))[1][2])
  close(*states, 1e-6)


def test_many_tokens_in_bfloat16():
  """The state is float32: 32k tokens are as far from float32 as a few are."""
  def outputs(dtype, x):
    y, _ = build(compute_dtype=dtype)(
        x.astype(dtype), Context(cases.counted(x)))
    return np.asarray(y[:, -64:], np.float64)
  x = jnp.asarray(np.random.default_rng(0).standard_normal(
      (1, 32_768, cases.MODEL['n_embd'])), jnp.float32)
  want, got = (outputs(dtype, x) for dtype in ('float32', 'bfloat16'))
  rms = lambda a: np.sqrt((a ** 2).mean())
  assert rms(got - want) < 0.02 * rms(want)


@pytest.mark.parametrize('groups', [1, 2, 8])
def test_a_mesh_changes_nothing(groups):
  """Four shards of heads: a group is of several, two have one, or each two."""
  mixer, x = build(mamba2_n_groups=groups), cases.inputs(T)
  ids = jnp.asarray([[1] * 5 + [2] * 7] * 2)
  mesh = jax.make_mesh((2, 1, 4), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)

  def everything(mesh):
    def loss(mixer, x, state):
      y, state = mixer(
          x, Context(segment_positions(ids), ids, mesh=mesh), state)
      return (y ** 3).sum(), (y, state)
    state = jax.tree.map(lambda x: x + 0.1, mixer.init_state(2, T))
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        mixer, x, state)

  jax.tree.map(lambda got, want: close(got, want, 1e-4),
               everything(mesh), everything(None))


def test_the_state_is_of_constant_size_and_S_in_float32():
  mixer, x = build(compute_dtype='bfloat16'), cases.inputs(T)
  short, long = (mixer.init_state(2, n) for n in (1, 1 << 20))
  _, after = mixer(x.astype(jnp.bfloat16), Context(cases.counted(x)), short)
  for taps, select_taps, S in (short, long, after):
    assert S.shape == (2, 8, 64, 8) and S.dtype == jnp.float32
    assert taps.shape == (2, 3, 64) and select_taps.shape == (2, 3, 128)
    assert taps.dtype == select_taps.dtype == jnp.bfloat16


@pytest.mark.parametrize('flags, message', [
    (dict(mamba2_head_dim=24), r'mamba2_head_dim \(24\) must divide .*\(64\)'),
    (dict(mamba2_n_groups=3), r"groups \(3\) must divide mamba2's heads \(8\)"),
    (dict(n_head=5), r'n_head \(5\) must divide .*, or set mamba2_head_dim'),
    (dict(mamba2_dt_at_least=0.2, mamba2_dt_at_most=0.1),
     r'mamba2_dt_at_least \(0.2\) must be less than mamba2_dt_at_most'),
], ids=['width', 'groups', 'heads', 'limits'])
def test_sizes_must_fit(flags, message):
  with pytest.raises(ValueError, match=message):
    build(**flags)


def test_flops_are_those_of_a_compiled_step():
  mixer = build(n_embd=128)
  x, state = jnp.zeros((1, 1, 128)), mixer.init_state(1, 1)
  measured = jax.jit(lambda mixer, x, state: mixer(
      x, Context(jnp.zeros((1, 1), int)), state)).lower(
          mixer, x, state).compile().cost_analysis()
  assert mixer.flops(1) == mixer.flops(1 << 20)
  assert 0.8 < mixer.flops(1) / measured['flops'] <= 1
