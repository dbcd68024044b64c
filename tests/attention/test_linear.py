"""Linear attention against its paper, step by step in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from attention import linear
from configs import default
from model.layers import segment_positions
from model.sharding import Context
from tests.attention import oracles
from tests.kernels.measure import relative_rms, same_bits

# Two chunks of the op, neither of them a power of two.
BATCH, TIME, WIDTH, HEADS = 4, 70, 16, 4


def build(**flags):
  config = default.get_config()
  config.update(n_embd=WIDTH, n_head=HEADS, init_std=0.5, **flags)
  return attention.build('linear', config, rngs=nnx.Rngs(0))


def inputs(time=TIME, seed=0):
  """x and segment ids whose documents end in other places in each row."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((BATCH, time, WIDTH)).astype(np.float32)
  ids = rng.integers(1, 3, (BATCH, -(-time // 10))).repeat(10, axis=1)
  return jnp.asarray(x), jnp.asarray(ids[:, :time], jnp.int32)


@jax.jit
def run(module, x, ids=None, state=None, positions=None):
  if positions is None:
    positions = (segment_positions(ids) if ids is not None else
                 jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
  return module(x, Context(positions, ids), state)


def oracle(mixer, x, *, positions, segment_ids):
  """Katharopoulos et al. 2020, equations 18 to 20, one query head at a time."""
  del segment_ids  # A document starts where its position is 0.
  options = mixer.options

  def phi(x):
    if options.use_rotary_embeddings:
      x = oracles.rotate(
          x, positions, options.rope_base, options.rope_fraction)
    if options.use_qk_norm:
      x = oracles.rms(x)
    x = oracles.float64(mixer.g) * x
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1

  q, k = (phi(oracles.dense(e, x)) for e in (mixer.query, mixer.key))
  v = oracles.dense(mixer.value, x)
  y = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, t, n in np.ndindex(q.shape[:3]):
    group = n // (q.shape[2] // k.shape[2])
    S, z = np.zeros((q.shape[-1], v.shape[-1])), np.zeros(q.shape[-1])
    for s in range(t - positions[b, t], t + 1):
      S += np.outer(k[b, s, group], v[b, s, group])
      z += k[b, s, group]
    y[b, t, n] = q[b, t, n] @ S / (q[b, t, n] @ z + 1e-6)
  return oracles.dense(mixer.out, y)


@pytest.mark.parametrize('flags', [
    {}, {'n_kv_group': 2, 'bias': True},
    {'n_kv_group': 1, 'use_qk_norm': True, 'use_rotary_embeddings': True},
], ids=['default', 'grouped', 'all'])
def test_matches_the_paper(flags):
  module, (x, ids) = build(**flags), inputs()
  y, _ = run(module, x, ids)
  want = oracle(module, np.asarray(x, np.float64), segment_ids=ids,
                positions=np.asarray(segment_positions(ids)))
  assert relative_rms(y, want) < 1e-5


def test_values_of_one_give_one():
  module = build(bias=True)
  module.value.weight[...] = jnp.zeros_like(module.value.weight[...])
  module.value.bias[...] = jnp.ones_like(module.value.bias[...])
  module.out.weight[...] = jnp.eye(WIDTH).reshape(module.out.weight.shape)
  x, ids = inputs()
  np.testing.assert_allclose(run(module, x, ids)[0], 1.0, rtol=1e-5)


def test_feature_map_is_elu_plus_one_and_never_zero():
  x = jnp.linspace(-80.0, 80.0, 641)
  y, slope = linear.feature_map(x), jax.vmap(jax.grad(linear.feature_map))(x)
  np.testing.assert_allclose(y, jax.nn.elu(x) + 1, atol=1e-6)
  np.testing.assert_allclose(slope, jnp.where(x > 0, 1, jnp.exp(x)), rtol=1e-6)
  assert float(y.min()) > 0


def test_g_starts_at_one_over_root_of_the_width_and_learns():
  module, (x, ids) = build(), inputs()
  assert float(module.g[...]) == (WIDTH // HEADS) ** -0.5
  assert not module.g.get_metadata('decay')
  loss = lambda module: (run(module, x, ids)[0] ** 3).sum()
  gradient = jax.tree.map(np.asarray, jax.grad(loss)(module))
  for leaf in jax.tree.leaves(gradient):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


@pytest.mark.parametrize('flags', [
    {'n_kv_group': 2}, {'use_qk_norm': True}, {'use_rotary_embeddings': True},
], ids=lambda flags: next(iter(flags)))
def test_flags_have_an_effect(flags):
  x, ids = inputs()
  plain, other = run(build(), x, ids)[0], run(build(**flags), x, ids)[0]
  assert relative_rms(other, plain) > 1e-3


def test_rope_base_has_an_effect():
  x, ids = inputs()
  short, long = (run(build(use_rotary_embeddings=True, rope_base=base), x, ids)
                 for base in (10.0, 10000.0))
  assert relative_rms(short[0], long[0]) > 1e-3


@pytest.mark.parametrize('flags, message', [
    ({'n_kv_group': 3}, r'n_kv_group \(3\) must divide n_head \(4\)'),
    ({'n_head': 3}, r'n_head \(3\) must divide n_embd \(16\)'),
    ({'use_qk_norm_scale': True}, 'use_qk_norm_scale=True has no effect'),
    ({'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0 has no'),
], ids=['group', 'heads', 'scale', 'softcap'])
def test_flags_that_cannot_be_honoured(flags, message):
  with pytest.raises(ValueError, match=message):
    config = default.get_config()
    config.update(n_embd=WIDTH, attention_variant='linear', **flags)
    attention.check(config)
    attention.build('linear', config, rngs=nnx.Rngs(0))


def test_attention_kernel_is_used():
  x, _ = inputs(1)
  with pytest.raises(ValueError, match='nonsense'):
    run(build(attention_kernel='nonsense'), x)


@pytest.mark.parametrize('flags', [
    {'n_kv_group': 2, 'use_rotary_embeddings': True},
    {'compute_dtype': 'bfloat16'}], ids=['float32', 'bfloat16'])
def test_handing_the_state_on_equals_the_whole(flags):
  module, (x, ids) = build(**flags), inputs()
  x = x.astype(flags.get('compute_dtype', 'float32'))
  whole, _ = run(module, x, ids)
  parts, positions = [], segment_positions(ids)
  state = module.init_state(BATCH, TIME)
  for start, stop in ((0, 34), (34, 35), (35, 36), (36, 70)):
    y, state = run(module, x[:, start:stop], ids[:, start:stop], state,
                   positions[:, start:stop])
    parts.append(y)
  tolerance = 2e-6 if x.dtype == jnp.float32 else 1e-2
  assert relative_rms(jnp.concatenate(parts, 1), whole) < tolerance


def test_a_state_forgets_another_segment_and_keeps_its_own():
  module, (x, _) = build(), inputs(20)
  one = jnp.ones((BATCH, 10), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(10), one.shape)
  _, state = run(module, x[:, :10], one, module.init_state(BATCH, TIME))
  alone, _ = run(module, x[:, 10:], one)
  other, _ = run(module, x[:, 10:], 2 * one, state, positions)
  same, _ = run(module, x[:, 10:], one, state, positions + 10)
  assert relative_rms(other, alone) < 2e-6
  assert relative_rms(same, alone) > 1e-3


def test_the_state_is_of_constant_size_and_in_float32():
  module, (x, _) = build(n_kv_group=2, compute_dtype='bfloat16'), inputs()
  short, long = (module.init_state(BATCH, n) for n in (1, 1 << 20))
  _, after = run(module, x.astype(jnp.bfloat16), state=short)
  shapes = lambda state: jax.tree.map(lambda a: (a.shape, a.dtype), state)
  assert shapes(short) == shapes(long) == shapes(after)
  S, z = after
  assert S.dtype == z.dtype == jnp.float32
  H = WIDTH // HEADS
  assert S.size + z.size == BATCH * 2 * H * (H + 1)


def test_documents_are_isolated_bit_for_bit():
  module, (x, _) = build(), inputs()
  ids = jnp.repeat(jnp.array([[1, 2, 1]] * BATCH), 25, axis=1)[:, :TIME]
  gradient = jax.jit(jax.grad(lambda x: (run(module, x, ids)[0] ** 3).sum()))
  changed = x.at[:, 25:50].multiply(-1e6)
  for before, after in ((run(module, x, ids)[0], run(module, changed, ids)[0]),
                        (gradient(x), gradient(changed))):
    for other in (slice(0, 25), slice(50, TIME)):
      assert same_bits(before[:, other], after[:, other])
    assert not same_bits(before[:, 25:50], after[:, 25:50])


@pytest.mark.parametrize('groups', [4, 1])
def test_a_mesh_changes_nothing(groups):
  module, (x, ids) = build(n_kv_group=groups), inputs()
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


def test_a_mesh_must_fit_the_heads():
  module, (x, _) = build(), inputs()
  mesh = jax.make_mesh((1, 1, 8), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with pytest.raises(ValueError, match=r'mesh_tensor \(8\) must divide the '):
    module(x, Context(segment_positions(jnp.zeros(x.shape[:2])), mesh=mesh))


def test_flops_are_those_of_a_compiled_step():
  config = default.get_config()
  module = attention.build('linear', config, rngs=nnx.Rngs(0))
  x, state = jnp.zeros((1, 1, config.n_embd)), module.init_state(1, 1)
  measured = run.lower(module, x, None, state).compile().cost_analysis()
  assert module.flops(1) == module.flops(1 << 20)
  assert 0.8 < module.flops(1) / measured['flops'] <= 1
