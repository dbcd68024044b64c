"""Mamba against its paper, step by step in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from configs import default
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import oracles
from tests.kernels.measure import relative_rms, same_bits

# Two chunks of the op, neither of them a power of two.
BATCH, TIME, WIDTH = 4, 45, 8


def build(**flags):
  config = default.get_config()
  config.update({'n_embd': WIDTH, 'init_std': 0.5, **flags})
  return attention.build('ssm', config, rngs=nnx.Rngs(0))


def inputs(seed=0):
  """x and segment ids whose documents end in other places in each row."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((BATCH, TIME, WIDTH)).astype(np.float32)
  ids = rng.integers(1, 3, (BATCH, TIME // 5)).repeat(5, axis=1)
  return jnp.asarray(x), jnp.asarray(ids, jnp.int32)


@jax.jit
def run(module, x, ids=None, state=None, positions=None):
  if positions is None:
    positions = segment_positions(
        jnp.zeros(x.shape[:2], jnp.int32) if ids is None else ids)
  return module(x, Context(positions, ids), state)


def silu(x):
  return x / (1 + np.exp(-x))


def oracle(mixer, x, *, positions, segment_ids):
  """Gu & Dao 2023, algorithm 2 in the block of figure 3, document by document.

  With the norms that the mixer has.
  """
  del segment_ids  # A document starts where its position is 0.
  dense, float64 = oracles.dense, oracles.float64
  norm = lambda x, layer: x if layer is None else (
      oracles.rms(x) * float64(layer.weight))
  taps, A = float64(mixer.conv), -np.exp(float64(mixer.A_log))
  (W, E), (_, M) = taps.shape, A.shape

  def document(u):
    x, z = dense(mixer.input, u), dense(mixer.gate, u)
    padded = np.concatenate([np.zeros((1, W - 1, E)), x], 1)
    x = silu(float64(mixer.conv_bias) + np.stack([
        (taps * padded[0, t:t + W]).sum(0) for t in range(x.shape[1])])[None])
    dt, B, C = np.split(dense(mixer.select, x), [-2 * M, -M], axis=-1)
    dt, B, C = (norm(dt, mixer.dt_norm), norm(B, mixer.B_norm),
                norm(C, mixer.C_norm))
    dt = np.log1p(np.exp(dense(mixer.step, dt) + float64(mixer.dt_bias)))
    h, y = np.zeros((E, M)), np.zeros_like(x)
    for t in range(x.shape[1]):
      h = (np.exp(dt[0, t][:, None] * A) * h
           + (dt[0, t] * x[0, t])[:, None] * B[0, t])
      y[0, t] = h @ C[0, t] + float64(mixer.D) * x[0, t]
    return dense(mixer.out, norm(y, mixer.y_norm) * silu(z))

  y = np.zeros_like(x)
  for b in range(len(x)):
    starts = np.flatnonzero(positions[b] == 0)
    for start, stop in zip(starts, [*starts[1:], x.shape[1]]):
      y[b:b + 1, start:stop] = document(x[b:b + 1, start:stop])
  return y


@pytest.mark.parametrize('flags', [
    {}, {'ssm_inner_norm': False, 'ssm_io_bias': True},
    {'ssm_conv_kernel_size': 1, 'ssm_mamba_expand': 3, 'ssm_dt_rank': 3,
     'ssm_d_state': 5},
], ids=['default', 'plain-mamba', 'other-sizes'])
def test_matches_the_paper(flags):
  module, (x, ids) = build(**flags), inputs()
  rng = np.random.default_rng(1)
  for name in ('D', 'dt_bias', 'A_log'):  # Away from their regular start.
    weight = getattr(module, name)
    weight[...] += 0.3 * rng.standard_normal(weight.shape).astype(np.float32)
  for layer in (module.input, module.gate, module.out):
    if layer.bias is not None:
      layer.bias[...] = jnp.linspace(-1, 1, layer.bias.size)
  y, _ = run(module, x, ids)
  want = oracle(module, np.asarray(x, np.float64), segment_ids=ids,
                positions=np.asarray(segment_positions(ids)))
  assert relative_rms(y, want) < 1e-5


def test_initial_step_sizes_are_log_uniform():
  module = build(n_embd=512)
  log_dt = np.sort(np.log(np.log1p(np.exp(
      np.asarray(module.dt_bias[...]).astype(np.float64)))))
  low, high = np.log(1e-3), np.log(1e-1)
  assert low - 1e-4 <= log_dt[0] and log_dt[-1] <= high + 1e-4
  quantiles = (np.arange(log_dt.size) + 0.5) / log_dt.size
  # Kolmogorov and Smirnov: one draw of a thousand is further off.
  distance = np.abs((log_dt - low) / (high - low) - quantiles).max()
  assert distance < 1.95 / log_dt.size ** 0.5


def test_initial_parameters():
  module = build(n_embd=512, ssm_dt_rank=4)
  E, M = 1024, 16
  np.testing.assert_allclose(
      np.exp(module.A_log[...]), np.tile(np.arange(1, M + 1), (E, 1)),
      rtol=1e-6)
  np.testing.assert_array_equal(module.D[...], np.ones(E))
  weight = np.asarray(module.step.weight[...])
  assert 0.49 < np.abs(weight).max() <= 0.5
  assert weight.std() == pytest.approx(0.5 / 3 ** 0.5, rel=0.05)
  residual = np.asarray(module.out.weight[...]).std()
  assert residual == pytest.approx(0.5 / (2 * 4) ** 0.5, rel=0.01)


def test_what_has_weight_decay():
  module = build(ssm_io_bias=True)
  parameters = nnx.to_flat_state(nnx.state(module, nnx.Param))
  decayed = {'/'.join(path) for path, p in parameters if p.decay}
  dense = {'input', 'gate', 'select', 'step', 'out'}
  assert decayed == {f'{name}/weight' for name in dense} | {'conv'}


def test_every_parameter_learns():
  module, (x, ids) = build(ssm_io_bias=True), inputs()
  loss = lambda module: (run(module, x, ids)[0] ** 3).sum()
  for leaf in map(np.asarray, jax.tree.leaves(jax.grad(loss)(module))):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


@pytest.mark.parametrize('flags, changed', [
    ({'ssm_mamba_expand': 1}, {'input', 'out', 'D'}),
    ({'ssm_conv_kernel_size': 2}, {'conv'}),
    ({'ssm_dt_rank': 2}, {'select', 'step'}),
    ({'ssm_d_state': 4}, {'select', 'A_log'}),
    ({'ssm_io_bias': True}, {'input', 'gate', 'out'}),
    ({'ssm_inner_norm': False}, {'dt_norm', 'B_norm', 'C_norm', 'y_norm'}),
], ids=lambda flags: next(iter(flags)))
def test_flags_change_parameters(flags, changed):
  shapes = lambda module: {
      '/'.join(path): p.shape
      for path, p in nnx.to_flat_state(nnx.state(module, nnx.Param))}
  before, after = shapes(build()), shapes(build(**flags))
  names = {path.split('/')[0] for path in set(before) | set(after)
           if before.get(path) != after.get(path)}
  assert changed <= names


@pytest.mark.parametrize('flag', [
    'ssm_mamba_expand', 'ssm_conv_kernel_size', 'ssm_dt_rank', 'ssm_d_state'])
def test_sizes_must_be_positive(flag):
  with pytest.raises(ValueError, match=rf'{flag} \(0\) must be at least 1'):
    build(**{flag: 0})


def test_attention_kernel_is_used():
  with pytest.raises(ValueError, match='gpu does not run on cpu'):
    run(build(attention_kernel='gpu'), inputs()[0])


@pytest.mark.parametrize('flags', [
    {}, {'ssm_conv_kernel_size': 4, 'ssm_inner_norm': False},
    {'ssm_conv_kernel_size': 1, 'compute_dtype': 'bfloat16'},
], ids=['default', 'plain-mamba', 'bfloat16'])
def test_handing_the_state_on_equals_the_whole(flags):
  module, (x, ids) = build(**flags), inputs()
  x = x.astype(flags.get('compute_dtype', 'float32'))
  whole, _ = run(module, x, ids)
  parts, state = [], module.init_state(BATCH, TIME)
  positions = segment_positions(ids)
  for start, stop in ((0, 22), (22, 23), (23, 45)):
    y, state = run(module, x[:, start:stop], ids[:, start:stop], state,
                   positions[:, start:stop])
    parts.append(y)
  tolerance = 2e-6 if x.dtype == jnp.float32 else 1e-2
  assert relative_rms(jnp.concatenate(parts, 1), whole) < tolerance


def test_a_state_forgets_another_segment_and_keeps_its_own():
  module, (x, _) = build(), inputs()
  x = x[:, :44]
  one = jnp.ones((BATCH, 22), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(22), one.shape)
  _, state = run(module, x[:, :22], one, module.init_state(BATCH, TIME))
  alone, _ = run(module, x[:, 22:], one)
  other, _ = run(module, x[:, 22:], 2 * one, state, positions)
  same, _ = run(module, x[:, 22:], one, state, positions + 22)
  assert relative_rms(other, alone) < 2e-6
  assert relative_rms(same, alone) > 1e-3


def test_the_state_is_of_constant_size_and_h_in_float32():
  module, (x, _) = build(compute_dtype='bfloat16'), inputs()
  short, long = (module.init_state(BATCH, n) for n in (1, 1 << 20))
  _, after = run(module, x.astype(jnp.bfloat16), state=short)
  shapes = lambda state: jax.tree.map(lambda a: (a.shape, a.dtype), state)
  assert shapes(short) == shapes(long) == shapes(after)
  taps, h = after
  assert h.dtype == jnp.float32
  assert h.shape == (BATCH, 2 * WIDTH, 16)
  assert taps.shape == (BATCH, 3 - 1, 2 * WIDTH)


@pytest.mark.parametrize('inner_norm', [True, False])
def test_documents_are_isolated_bit_for_bit(inner_norm):
  module, (x, _) = build(ssm_inner_norm=inner_norm), inputs()
  ids = jnp.repeat(jnp.array([[1, 2, 1]] * BATCH), 15, axis=1)

  @jax.jit
  def both(x):
    loss = lambda x: (run(module, x, ids)[0] ** 3).sum()
    return run(module, x, ids)[0], jax.grad(loss)(x)

  for before, after in zip(both(x), both(x.at[:, 15:30].multiply(-100.0))):
    for other in (slice(0, 15), slice(30, TIME)):
      assert same_bits(before[:, other], after[:, other])
    assert not same_bits(before[:, 15:30], after[:, 15:30])


@pytest.mark.parametrize('inner_norm', [True, False])
def test_a_mesh_changes_nothing(inner_norm):
  module, (x, ids) = build(ssm_inner_norm=inner_norm), inputs()
  _, state = run(module, x, ids, module.init_state(BATCH, TIME))
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)

  def everything(mesh):
    def loss(module, x, state):
      positions = segment_positions(ids)
      y, state = module(x, Context(positions, ids, mesh=mesh), state)
      bare, _ = module(x, Context(positions, mesh=mesh))
      return (y ** 3).sum() + (bare ** 3).sum(), (y, bare, state)
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        module, x, state)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max()),
      everything(None), everything(mesh))


def test_a_mesh_must_divide_the_inner_width():
  module, (x, ids) = build(n_embd=6, ssm_mamba_expand=2), inputs()
  mesh = jax.make_mesh((1, 1, 8), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with pytest.raises(ValueError, match=r'mesh_tensor \(8\) must divide E'):
    module(x[..., :6], Context(ids, ids, mesh=mesh))


def test_flops_are_those_of_a_compiled_step():
  module = build(n_embd=128)
  x, state = jnp.zeros((1, 1, 128)), module.init_state(1, 1)
  measured = run.lower(module, x, None, state).compile().cost_analysis()
  assert module.flops(1) == module.flops(1 << 20)
  assert 0.8 < module.flops(1) / measured['flops'] <= 1
