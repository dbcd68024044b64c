"""The layers of the delta rule against those of Hugging Face's transformers.

As test_transformers.py, and gradients: our parameters are theirs in another
order, so that the rows of MODELS take gradients from one to the other as well.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention import cases
from tests.oracles import layers
from tests.oracles.layers import D, H, Model, N, alone, rows, torch

pytestmark = pytest.mark.oracles

V, W = 2 * H, 4  # Of values; taps.
TOLERANCE = 1e-5  # As a part of the largest number.


def convs(*widths):
  """{ours of q, k and v: their parts of one of all, [channels,1,W]}."""
  ends = np.cumsum([0, *(N * width for width in widths)])
  return {
      f'convs.{i}.weight': lambda w, i=i: (
          w['conv1d.weight'][ends[i]:ends[i + 1]])
      for i in range(len(widths))}


def part(name, widths, i):
  """Outputs i of a projection that has those of one head side by side."""
  start = sum(widths[:i])
  return lambda w: rows(
      w[name], sum(widths), np.r_[start:start + widths[i]])


QKVZ = functools.partial(part, 'in_proj_qkvz.weight', (H, H, V, V))
BETA_DECAY = functools.partial(part, 'in_proj_ba.weight', (1, 1))

# {ours: theirs}, as in test_transformers.py.
QWEN3_NEXT = convs(H, H, V) | {
    'query.weight': QKVZ(0),
    'key.weight': QKVZ(1),
    'value.weight': QKVZ(2),
    'gate.weight': QKVZ(3),
    'beta.weight': BETA_DECAY(0),
    'norm.weight': 'norm.weight',
    'out.weight': 'out_proj.weight',
}
QWEN3_NEXT_DECAY = {
    'decay.project.weight': BETA_DECAY(1),
    'decay.A_log': 'A_log',
    'decay.dt_bias': 'dt_bias',
}
PROJECTIONS = {
    'query.weight': 'q_proj.weight',
    'key.weight': 'k_proj.weight',
    'value.weight': 'v_proj.weight',
    'beta.weight': 'b_proj.weight',
    'norm.weight': 'o_norm.weight',
    'out.weight': 'o_proj.weight',
}
OLMO_HYBRID = PROJECTIONS | convs(H, H, V) | {
    'gate.weight': 'g_proj.weight',
}
OLMO_HYBRID_DECAY = {
    'decay.project.weight': 'a_proj.weight',
    'decay.A_log': 'A_log',
    'decay.dt_bias': 'dt_bias',
}
KIMI_LINEAR = PROJECTIONS | convs(H, H, H) | {
    'gate.down.weight': 'g_a_proj.weight',
    'gate.up.weight': 'g_b_proj.weight',
    'decay.project.down.weight': 'forget_gate.f_a_proj.weight',
    'decay.project.up.weight': 'forget_gate.f_b_proj.weight',
    'decay.A_log': 'forget_gate.A_log',
    'decay.dt_bias': 'forget_gate.dt_bias',
}


def olmo(layer, find, x):
  """A layer whose norm has our eps: it ignores its config and takes 1e-5."""
  layer.o_norm.variance_epsilon = 1e-6
  return alone(layer, find, x)


HEADS = dict(
    hidden_size=D, linear_num_key_heads=N, linear_num_value_heads=N,
    linear_key_head_dim=H, linear_value_head_dim=V, linear_conv_kernel_dim=W)
QWEN = functools.partial(
    Model, 'qwen3_next', 'Qwen3Next', 'GatedDeltaNet',
    HEADS | dict(num_hidden_layers=1), call=alone)
OLMO = functools.partial(
    Model, 'olmo_hybrid', 'OlmoHybrid', 'GatedDeltaNet',
    # Its second layer is attention, which it has to have.
    HEADS | dict(num_hidden_layers=2, linear_allow_neg_eigval=True),
    call=olmo)
FLAGS = dict(delta_expand_v=2, delta_conv_kernel_size=W)
REFLECTING = FLAGS | dict(delta_beta_max=2.0)
# If they forget faster, the gradients of decays are small differences of large
# numbers: those of both are off by 1e-4 in float32.
SLOW = np.linspace(-3.5, -2.5, N)
# There is no DeltaNet: it is theirs with decays of exactly 1.
KEPT = dict(A_log=-np.inf)

MODELS = {
    'gated_deltanet': QWEN(
        'gated_deltanet', FLAGS, QWEN3_NEXT | QWEN3_NEXT_DECAY,
        constants=dict(A_log=SLOW)),
    'gated_deltanet-reflecting': OLMO(
        'gated_deltanet', REFLECTING, OLMO_HYBRID | OLMO_HYBRID_DECAY,
        constants=dict(A_log=SLOW)),
    'deltanet': QWEN('deltanet', FLAGS, QWEN3_NEXT, constants=KEPT),
    'deltanet-reflecting': OLMO(
        'deltanet', REFLECTING, OLMO_HYBRID, constants=KEPT),
    'kda': Model(
        'kimi_linear', 'KimiLinear', 'DeltaAttention',
        dict(hidden_size=D, linear_num_heads=N, linear_head_dim=H,
             linear_conv_kernel_dim=W, rms_norm_eps=1e-6, num_hidden_layers=1),
        'kda', dict(delta_conv_kernel_size=W), KIMI_LINEAR,
        constants={'forget_gate.A_log': SLOW[:, None]}, call=alone),
}


@functools.cache
def built(name):
  """(our Attention, their layer, it as a function), with gradients."""
  mixer, layer, theirs = layers.build(MODELS[name])
  return mixer, layer.requires_grad_(), theirs


def outputs(theirs, x):
  return layers.numpy(theirs(torch.tensor(np.array(x))))


def their_gradients(layer, theirs, x, weights):
  """{name: gradient of (outputs * weights).sum()}, that of x as 'x'."""
  x, weights = (torch.tensor(np.array(a)) for a in (x, weights))
  parameters = dict(layer.named_parameters()) | {'x': x.requires_grad_()}
  loss = (theirs(x) * weights).sum()
  gradients = torch.autograd.grad(loss, list(parameters.values()))
  return dict(zip(parameters, map(layers.numpy, gradients), strict=True))


@jax.jit
def our_gradients(mixer, x, weights):
  loss = lambda mixer, x: jnp.vdot(layers.plain(mixer, x), weights)
  return jax.grad(loss, (0, 1))(mixer, x)


def agree(got, want, what):
  """Asserts a small error as a part of the largest number.

  Of 0.1, if all are below: the first token has a gradient of decays of zero.
  """
  got = np.asarray(got)
  assert got.shape == want.shape
  worst = np.abs(got - want).max() / max(np.abs(want).max(), 0.1)
  assert worst <= TOLERANCE, f'error {worst:.2g} in {what}'


each = pytest.mark.parametrize('name', MODELS)
# Their chunks are of 64.
each_length = pytest.mark.parametrize('T', [1, 63, 65])


@each
@each_length
def test_same_outputs(name, T):
  mixer, _, theirs = built(name)
  x = cases.inputs(T)
  agree(layers.plain(mixer, x), outputs(theirs, x), 'the outputs')


@each
@each_length
def test_same_gradients(name, T):
  mixer, layer, theirs = built(name)
  x, weights = cases.inputs(T), cases.inputs(T, seed=1)
  want = their_gradients(layer, theirs, x, weights)
  got, of_x = our_gradients(mixer, x, weights)
  agree(of_x, want['x'], 'that of x')
  for path, value in cases.parameters(got).items():
    ours = path.removesuffix('/value').replace('/', '.')
    source = MODELS[name].weights[ours]
    agree(value, layers.ours_of(want, source, value.shape), ours)


@each
def test_packed_documents_are_separate_calls(name):
  mixer, _, theirs = built(name)
  x, lengths = cases.inputs(65), (7, 58)
  documents = np.split(x, [lengths[0]], axis=1)
  agree(layers.packed(mixer, x, lengths),
        np.concatenate([outputs(theirs, part) for part in documents], 1),
        'the outputs')


@each
def test_decoding_is_one_call(name):
  mixer, _, theirs = built(name)
  x = cases.inputs(65)
  agree(layers.decoded(mixer, x, 60), outputs(theirs, x), 'the outputs')
