"""Causal attention: its oracle, and what the flags mean by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attention
from attention.common.bias import alibi, alibi_slopes
from attention.kernels import dispatch
from configs import default
from model.sharding import Context
from tests.attention import cases, weights
from tests.attention.oracles import dense, float64, gated, rms, rotate


def oracle(mixer, x, *, positions, segment_ids):
  """Vaswani et al. 2017, section 3.2, one query at a time."""
  q, k, v = (dense(p, x) for p in (mixer.query, mixer.key, mixer.value))
  if mixer.mix is not None:  # Alone, it is the first layer.
    v = float64(mixer.mix).sum() * v
  y = softmax_attention(
      mixer.softmax, q, k, v, x, positions=positions,
      segment_ids=segment_ids)
  return dense(mixer.out, gated(mixer.gate, x, y))


def softmax_attention(softmax, q, k, v, x, *, positions, segment_ids):
  """What a Softmax module does between projections.

  Args:
    softmax: the Softmax module, for its options and learned numbers.
    q, k, v: float64 [B,T,N,H], [B,T,K,H], [B,T,K,V].
    x: float64 [B,T,D], what they were made of.
    positions, segment_ids: int [B,T].

  Returns:
    float64 [B,T,N,V].
  """
  options = softmax.options
  B, T, N, H = q.shape
  scale = 1 / math.sqrt(H)
  if options.use_rotary_embeddings:
    q, k = (rotate(a, positions, options.rope_base, options.rope_fraction)
            for a in (q, k))
  if options.use_qk_norm:
    q, k = rms(q), rms(k)
  if options.use_qk_norm_scale:
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    scale = float(softmax.g[...])
  y = np.zeros((B, T, N, v.shape[-1]))
  for b, t, n in np.ndindex(B, T, N):
    group = n // (N // k.shape[2])
    seen = [s for s in range(t + 1)
            if segment_ids[b, s] == segment_ids[b, t]
            and (not options.window_size or t - s < options.window_size)]
    s = scale * k[b, seen, group] @ q[b, t, n]
    if options.attn_logit_softcapping:
      cap = options.attn_logit_softcapping
      s = cap * np.tanh(s / cap)
    s += score_bias(softmax, x[b], t, np.array(seen), n)
    w = weights.of(softmax, s, head=n, distances=t - np.array(seen),
                   position=positions[b, t], off_by=_off_by(softmax, n))
    y[b, t, n] = w @ v[b, seen, group]
    if options.attn_xsa:
      own = v[b, t, group] / np.linalg.norm(v[b, t, group])
      y[b, t, n] -= (y[b, t, n] @ own) * own
  return y


def score_bias(softmax, x, t, seen, head):
  """What ALiBi and the forget gates add to scores of a query.

  Args:
    softmax: the Softmax module.
    x: float64 [T,D], its inputs.
    t: the query.
    seen: int [S], the keys.
    head: of the query.

  Returns:
    float64 [S].
  """
  options, bias = softmax.options, np.zeros(len(seen))
  if options.use_alibi:
    bias -= alibi_slope(head, softmax.n_head) * (t - seen)
  if options.use_forget_gate:
    gate = softmax.forget
    logit = dense(gate.logit, x)[:, head] + float64(gate.bias)[head]
    # The log of the product of the gates between key and query.
    bias += [np.log(1 / (1 + np.exp(-logit[s + 1:t + 1]))).sum() for s in seen]
  return bias


def alibi_slope(head, n_head):
  """Press et al. 2021, section 3."""
  power = 2 ** math.floor(math.log2(n_head))
  if head < power:
    return 2 ** (-8 / power * (head + 1))
  return 2 ** (-8 / (2 * power) * (2 * (head - power) + 1))


def _off_by(softmax, head):
  """The constant e^lambda in the denominator of a head, or 0."""
  options = softmax.options
  if options.use_flash_obo_const:
    return math.exp(options.flash_lobo_log_const)
  if not options.use_flash_lobo:
    return 0.0
  log_sink = float64(softmax.log_sink)
  return math.exp(
      log_sink[head] if options.use_flash_lobo_per_head else log_sink)


def build(**flags):
  config = default.get_config()
  config.update({'n_embd': 24, 'n_head': 6, 'n_layer': 2, 'block_size': 16,
                 **flags})
  attention.check(config)
  return jax.jit(lambda key: attention.build(
      'causal', config, rngs=nnx.Rngs(key)))(jax.random.key(0))


@jax.jit
def run(mixer, x):
  return mixer(x.astype(jnp.float32), Context(jnp.arange(x.shape[1])[None]))[0]


def example(T=7):
  return np.random.default_rng(0).standard_normal((1, T, 24))


@pytest.mark.parametrize('flags, named', [
    (dict(n_kv_group=4), 'n_kv_group (4) must divide n_head (6)'),
    (dict(n_kv_group=0), 'n_kv_group (0)'),
    (dict(n_kv_group=12), 'use 1, 2, 3 or 6'),
    (dict(n_kv_group=-1), 'n_kv_group (-1)'),
    (dict(rope_fraction=1.5, use_rotary_embeddings=True),
     'rope_fraction (1.5) must be more than 0 and at most 1'),
    (dict(rope_fraction=0.5), 'rope_fraction=0.5 has no effect'),
    (dict(n_head=5), 'n_head (5) must divide n_embd (24)'),
    (dict(attn_logit_softcapping=-1.0), 'attn_logit_softcapping (-1.0)'),
    (dict(window_size=-3), 'window_size (-3)'),
    (dict(attn_gate='heads'), 'did you mean head?'),
    (dict(use_qk_norm_scale=True), 'use_qk_norm'),
    (dict(use_flash_lobo_per_head=True), 'use_flash_lobo'),
    (dict(use_flash_lobo=True, use_flash_obo_const=True),
     'use_flash_obo_const'),
    (dict(use_flash_obo_const=True, use_flash_lobo_per_head=True),
     'contradicts'),
    (dict(flash_lobo_log_const=1.0), 'flash_lobo_log_const=1.0 has no effect'),
    (dict(disable_flash_attention=True, attention_kernel='xla'),
     'attention_kernel=xla'),
], ids=lambda v: '-'.join(v) if isinstance(v, dict) else None)
def test_bad_flags_are_named(flags, named):
  with pytest.raises(ValueError) as error:
    build(**flags)
  assert named in str(error.value)
  assert '\n' not in str(error.value)


def test_an_odd_head_width_cannot_be_rotated():
  mixer = build(n_head=8, use_rotary_embeddings=True)  # 24 / 8 = 3.
  with pytest.raises(ValueError, match='even head width, not 3'):
    run(mixer, example())


def test_an_unknown_kernel_is_named():
  with pytest.raises(ValueError) as error:
    build(attention_kernel='gup')
  assert str(error.value) == (
      "unknown attention_kernel 'gup', did you mean gpu? known: auto, xla, "
      'tpu, gpu, cudnn')


@pytest.mark.parametrize('kernel', ['tpu', 'gpu', 'cudnn'])
def test_a_named_kernel_runs_nowhere_else(kernel):
  """In a notebook on a CPU too: one line, before anything is lowered."""
  with pytest.raises(ValueError) as error:
    run(build(attention_kernel=kernel), example())
  assert str(error.value) == (
      f'attention_kernel={kernel} does not run on cpu: use auto or xla')


@pytest.mark.parametrize('kernel, target', [
    ('gpu', ('gpu', '8.0')), ('gpu', ('gpu', '9.0')),
    ('cudnn', ('gpu', '7.5'))], ids=['ampere', 'float32', 'volta'])
def test_a_named_kernel_never_falls_back(kernel, target):
  """Compute capability 8.0 has no wgmma, Hopper's tensor cores no float32."""
  with dispatch.pretend(*target), pytest.raises(NotImplementedError):
    run.__wrapped__(build(attention_kernel=kernel), example())


def test_window_of_one_sees_only_itself():
  """W counts oneself: softmax over one token is its value."""
  mixer, x = build(window_size=1), example()
  want = dense(mixer.out, dense(mixer.value, x))
  np.testing.assert_allclose(run(mixer, x), want, atol=1e-6)


def test_softmax_of_the_first_token_with_a_constant():
  """Lambda = s makes the mass one half."""
  mixer, x = build(use_flash_obo_const=True), example(T=1)
  q, k, v = (dense(p, x) for p in (mixer.query, mixer.key, mixer.value))
  mass = 1 / (1 + np.exp(-(q * k).sum(-1, keepdims=True) / 2))
  np.testing.assert_allclose(
      run(mixer, x), dense(mixer.out, mass * v), atol=1e-6)


def test_the_learned_scale_starts_at_henrys_value():
  mixer = build(use_qk_norm=True, use_qk_norm_scale=True)
  assert float(mixer.softmax.g[...]) == pytest.approx(math.log2(16 * 16 - 16))


@pytest.mark.parametrize('per_head', [False, True])
def test_lambda_has_its_shape_and_start(per_head):
  mixer = build(use_flash_lobo=True, use_flash_lobo_per_head=per_head,
                flash_lobo_log_const=1.5)
  log_sink = mixer.softmax.log_sink
  assert log_sink[...].shape == ((6,) if per_head else ())
  assert log_sink[...].dtype == jnp.float32
  assert not log_sink.decay
  np.testing.assert_allclose(log_sink[...], 1.5)


def test_qk_norm_scale_is_a_cosine():
  """Scores do not depend on the lengths of q and k."""
  mixer = build(use_qk_norm=True, use_qk_norm_scale=True, init_std=0.3)
  x = example()
  before = run(mixer, x)
  mixer.query.weight[...] *= 7.0
  mixer.key.weight[...] *= 0.3
  np.testing.assert_allclose(run(mixer, x), before, atol=2e-5)


@pytest.mark.parametrize('gate', ['head', 'element'])
def test_a_gate_of_zero_weights_is_half_open(gate):
  mixer, x = build(attn_gate=gate), example()
  mixer.gate.project.weight[...] *= 0.0
  np.testing.assert_allclose(run(mixer, x), run(build(), x) / 2, atol=1e-6)


def test_a_closed_gate_is_finite_and_zero():
  mixer, x = build(attn_gate='element', bias=True), example()
  mixer.out.bias[...] *= 0.0
  for bias in (-1e4, 1e4):
    mixer.gate.project.bias[...] = jnp.full((6, 4), bias)
    y = run(mixer, x)
    assert np.isfinite(y).all() and y.any() == (bias > 0)
    slopes = jax.grad(lambda m: (run(m, x) ** 2).sum())(mixer)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes))


@pytest.mark.parametrize('groups', [6, 2])
def test_exclusive_heads_are_orthogonal_to_their_own_value(groups):
  mixer, x = build(attn_xsa=True, n_kv_group=groups), example(T=33)
  mixer.out.weight[...] = jnp.eye(24).reshape(6, 4, 24)
  y = np.asarray(run(mixer, x)).reshape(1, 33, 6, 4)
  v = np.repeat(dense(mixer.value, x), 6 // groups, axis=2)
  along = (y * v).sum(-1) / np.linalg.norm(v, axis=-1)
  assert np.abs(along).max() < 1e-6 < np.abs(y[:, 1:]).min(-1).max()
  np.testing.assert_allclose(y[:, 0], 0, atol=1e-6)  # It sees itself alone.


@pytest.mark.parametrize('size', [0.0, 1e-30, 1e12])
def test_exclusive_heads_of_any_value_are_finite(size):
  mixer, x = build(attn_xsa=True), example()
  mixer.value.weight[...] *= size
  y, slopes = jax.value_and_grad(lambda m: run(m, x).sum())(mixer)
  assert np.isfinite(y)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes))


def test_window_keeps_a_ring_of_w_minus_one():
  state = build(window_size=5).init_state(2, 1000)
  assert [v.shape for v in state['values']] == [(2, 4, 6, 4)] * 2


def test_grouped_queries_shrink_the_cache():
  state = build(n_kv_group=2).init_state(2, 10)
  assert [v.shape for v in state['values']] == [(2, 10, 2, 4)] * 2


def test_too_many_tokens_for_a_state():
  mixer, x = build(), example()
  ctx = Context(jnp.arange(7)[None])
  with pytest.raises(ValueError, match='7 tokens do not fit .* length 6'):
    mixer(jnp.asarray(x, jnp.float32), ctx, mixer.init_state(1, 6))


@pytest.mark.parametrize('gate, columns', [('head', 6), ('element', 24)])
def test_a_gate_has_its_flops(gate, columns):
  assert build(attn_gate=gate).flops(8) - build().flops(8) == 2 * 24 * columns


@pytest.mark.parametrize('n_head, want', [
    (8, [1/2, 1/4, 1/8, 1/16, 1/32, 1/64, 1/128, 1/256]),
    (6, [1/4, 1/16, 1/64, 1/256, 1/2, 1/8]), (1, [1/256])], ids=str)
def test_alibi_slopes(n_head, want):
  """Those that Press et al. print, and what their code gives for six."""
  np.testing.assert_allclose(alibi_slopes(n_head), want, rtol=1e-12)


def test_alibi_has_no_parameters_and_no_state():
  mixer, plain = build(use_alibi=True), build()
  assert jax.tree.structure(mixer) != jax.tree.structure(plain)
  assert jax.tree.map(jnp.shape, jax.tree.leaves(mixer)) == jax.tree.map(
      jnp.shape, jax.tree.leaves(plain))
  assert jax.tree.map(jnp.shape, mixer.init_state(2, 9)) == jax.tree.map(
      jnp.shape, plain.init_state(2, 9))


def test_alibi_is_the_same_wherever_a_row_starts():
  """At index 50,000 of a cache, for slopes that are no powers of two."""
  row, column = alibi(12, batch=1, queries=1, keys=50_001, q_offset=50_000)
  got = np.asarray(row - column).sum(-1)[0]
  distance = 50_000 - np.arange(50_001)
  np.testing.assert_allclose(
      got, -np.outer(distance, alibi_slopes(12)), atol=3e-5, rtol=1e-6)


def test_the_sums_of_gates_are_float32_in_the_state():
  state = build(use_forget_gate=True, compute_dtype='bfloat16').init_state(2, 9)
  assert [(x.dtype, x.shape) for x in state['values']] == [
      (jnp.bfloat16, (2, 9, 6, 4)), (jnp.bfloat16, (2, 9, 6, 4)),
      (jnp.float32, (2, 9, 6, 2))]


@pytest.mark.parametrize('bias', [-1e6, 0.0, 1e6])
def test_any_gates_give_finite_outputs_and_gradients(bias):
  mixer = build(use_forget_gate=True, forget_gate_bias_init=bias)
  y, gradient = jax.value_and_grad(
      lambda mixer: (run(mixer, 1e4 * example()) ** 2).mean())(mixer)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, gradient)))


@pytest.mark.parametrize('window', [None, 3])
def test_flops_are_those_of_the_sums(window):
  """Counted pair by pair: 2 H for a score and 2 V for its value."""
  mixer, T = build(window_size=window), 8
  pairs = sum(min(t + 1, window or T) for t in range(T))
  dense_flops = 4 * 2 * 24 * 24
  assert mixer.flops(T) == pytest.approx(
      dense_flops + pairs * 6 * 2 * (4 + 4) / T)


@pytest.mark.parametrize('flags, message', [
    (dict(softmax_variant_attn='relumx'), 'did you mean relumax'),
    (dict(relumax_divisor=2.0),
     'without softmax_variant_attn=relumax: set both or neither'),
    (dict(softmax_variant_attn='relumax', use_flash_lobo=True),
     'no place in softmax_variant_attn=relumax'),
    (dict(consmax_base=3.0, softmax_variant_attn='consmax'),
     'without consmax_use_euler_base=false'),
], ids=['unknown', 'of another', 'off by one', 'base'])
def test_weights_that_cannot_be(flags, message):
  config = cases.config(attention_variant='causal')
  with pytest.raises(ValueError, match=message):
    config.update(flags)
    default.check(config)


def test_softermax_is_a_softmax_that_kernels_run():
  mixer = cases.build(cases.Case(
      'causal', 'kernel', (('softmax_variant_attn', 'softermax'),)))
  x = jax.ShapeDtypeStruct((2, 256, 32), jnp.float32)
  with dispatch.pretend('tpu', 'v5e'), dispatch.record() as choices:
    jax.eval_shape(lambda x: cases.plain(mixer, x), x)
  assert choices == {'attention.kernels.flash': {'tpu': ''}}
