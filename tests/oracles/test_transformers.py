"""Our layers against other people's: those of Hugging Face's transformers.

Random weights, tiny sizes, float32 on CPU, nothing is downloaded. What a model
is called here, which flags make our layer the same mechanism, and where each
of our parameters comes from is the table MODELS.
"""

import functools
import importlib

import numpy as np
import pytest

from attention.common.bias import alibi_slopes
from tests.attention import cases
from tests.oracles import layers
from tests.oracles.layers import D, H, Model, N, agree, alone, rows, torch

BLOOM_CODE = importlib.import_module('transformers.models.bloom.modeling_bloom')

pytestmark = pytest.mark.oracles

# Letters of the attention package. R: mla's latent; r: its rotary part.
K, R, r = 2, 12, 6
E, M, W, DT_RANK = 64, 5, 4, 3  # ssm: inner width, state, taps, rank of dt.
STEPS = (0.3, 1.5)  # mamba2: limits that random step sizes reach.
BASE, WINDOW, CAP = 100.0, 5, 0.5
T = 17

ATTENTION = dict(
    hidden_size=D, num_attention_heads=N, num_hidden_layers=1, vocab_size=32,
    attn_implementation='eager',
    rope_parameters=dict(rope_type='default', rope_theta=BASE))
GROUPED = dict(num_key_value_heads=K, head_dim=H, **ATTENTION)
ROTARY = dict(use_rotary_embeddings=True, rope_base=BASE, n_kv_group=K)

# Gemma 2 divides scores by the root of a number that need not be the head
# width; ours always by that of the head width.
GEMMA_SCALAR = 12
# With constant weights g of its two norms, Qwen3's scores are ours with a
# learned scale; q . k = g_q g_k H cos(q, k).
QWEN_NORMS = {'q_norm.weight': 1.5, 'k_norm.weight': 1.25}


def halves(name, heads):
  """Their heads of width H / 2, those of the first half of ours at first."""
  return lambda w: np.moveaxis(
      w[name].reshape(2, heads, H // 2, D), 0, 1).reshape(-1, D)


# DeepSeek rotates neighbours (2h, 2h + 1), ours (h, h + r / 2): the numbers of
# a rotary part, in our order.
UNPAIRED = np.r_[0:r:2, 1:r:2]
LATENT_THEN_ROTARY = np.r_[0:R, R + UNPAIRED]

# {ours: theirs}, a name or a function of all of theirs. Their Linear is
# [outputs, inputs]: everything is transposed, then takes our shape.
PROJECTIONS = {
    'query.weight': 'q_proj.weight',
    'key.weight': 'k_proj.weight',
    'value.weight': 'v_proj.weight',
    'out.weight': 'o_proj.weight',
}
QWEN3_SCALED = PROJECTIONS | {
    'softmax.g': lambda w: (
        w['q_norm.weight'][0] * w['k_norm.weight'][0] * H ** 0.5),
}
GEMMA2 = PROJECTIONS | {
    'query.weight': lambda w: w['q_proj.weight'] * (H / GEMMA_SCALAR) ** 0.5,
}
GPT_OSS = PROJECTIONS | {
    'query.bias': 'q_proj.bias',
    'key.bias': 'k_proj.bias',
    'value.bias': 'v_proj.bias',
    'out.bias': 'o_proj.bias',
    'softmax.log_sink': 'sinks',
}
# Their projection has a head's query, key and value side by side.
BLOOM = {
    f'{ours}.{kind}': lambda w, i=i, kind=kind: rows(
        w[f'query_key_value.{kind}'], 3 * H, np.r_[i * H:i * H + H])
    for i, ours in enumerate(('query', 'key', 'value'))
    for kind in ('weight', 'bias')
} | {'out.weight': 'dense.weight', 'out.bias': 'dense.bias'}
DEEPSEEK_V2 = {
    'query.weight': lambda w: rows(
        w['q_proj.weight'], H + r, np.r_[0:H, H + UNPAIRED]),
    'query.bias': lambda w: np.zeros(N * (H + r)),  # They have none here.
    'down.weight': lambda w: (
        w['kv_a_proj_with_mqa.weight'][LATENT_THEN_ROTARY]),
    'down.bias': lambda w: w['kv_a_proj_with_mqa.bias'][LATENT_THEN_ROTARY],
    'norm.weight': 'kv_a_layernorm.weight',
    'key.weight': lambda w: rows(w['kv_b_proj.weight'], 2 * H, np.r_[:H]),
    'value.weight': lambda w: rows(
        w['kv_b_proj.weight'], 2 * H, np.r_[H:2 * H]),
    'out.weight': 'o_proj.weight',
    'out.bias': 'o_proj.bias',
}
# Their query projection has a head's queries and its gates side by side.
QWEN3_NEXT = PROJECTIONS | {
    'query.weight': lambda w: rows(w['q_proj.weight'], 2 * H, np.r_[:H]),
    'gate.project.weight': lambda w: rows(
        w['q_proj.weight'], 2 * H, np.r_[H:2 * H]),
}
DIFFLLAMA = {
    'query.weight': halves('q_proj.weight', N),
    'key.weight': halves('k_proj.weight', K),
    'value.weight': halves('v_proj.weight', K),
    'lambda_q': lambda w: np.stack([w['lambda_q1'], w['lambda_q2']], 1),
    'lambda_k': lambda w: np.stack([w['lambda_k1'], w['lambda_k2']], 1),
    'norm.weight': lambda w: np.ones(H),  # They have none.
    'out.weight': 'o_proj.weight',
}
MAMBA = {
    'input.weight': lambda w: w['in_proj.weight'][:E],
    'input.bias': lambda w: w['in_proj.bias'][:E],
    'gate.weight': lambda w: w['in_proj.weight'][E:],
    'gate.bias': lambda w: w['in_proj.bias'][E:],
    'conv': 'conv1d.weight',  # [E,1,W]
    'conv_bias': 'conv1d.bias',
    'select.weight': 'x_proj.weight',
    'step.weight': 'dt_proj.weight',
    'dt_bias': 'dt_proj.bias',
    'A_log': lambda w: w['A_log'].T,  # Not a map: [E,M] in both.
    'D': 'D',
    'out.weight': 'out_proj.weight',
    'out.bias': 'out_proj.bias',
}
MAMBA2 = {
    'gate.weight': lambda w: w['in_proj.weight'][:E],
    'gate.bias': lambda w: w['in_proj.bias'][:E],
    'input.weight': lambda w: w['in_proj.weight'][E:2 * E],
    'input.bias': lambda w: w['in_proj.bias'][E:2 * E],
    'select.weight': lambda w: w['in_proj.weight'][2 * E:],
    'select.bias': lambda w: w['in_proj.bias'][2 * E:],
    'conv': lambda w: w['conv1d.weight'][:E],  # [channels,1,W]
    'conv_bias': lambda w: w['conv1d.bias'][:E],
    'select_conv': lambda w: w['conv1d.weight'][E:],
    'select_conv_bias': lambda w: w['conv1d.bias'][E:],
    'dt_bias': 'dt_bias',
    'A_log': 'A_log',
    'D': 'D',
    'norm_weight': 'norm.weight',
    'out.weight': 'out_proj.weight',
    'out.bias': 'out_proj.bias',
}
GRIFFIN = {
    'input.weight': 'linear_x.weight',
    'input.bias': 'linear_x.bias',
    'gate.weight': 'linear_y.weight',
    'gate.bias': 'linear_y.bias',
    'conv': 'conv_1d.weight',  # [E,1,W]
    'conv_bias': 'conv_1d.bias',
    # [N,in,out] and [N,out] in both.
    'r.weight': lambda w: w['rg_lru.recurrent_gate_weight'].T,
    'r.bias': lambda w: w['rg_lru.recurrent_gate_bias'].T,
    'i.weight': lambda w: w['rg_lru.input_gate_weight'].T,
    'i.bias': lambda w: w['rg_lru.input_gate_bias'].T,
    'Lambda': 'rg_lru.recurrent_param',
    'out.weight': 'linear_out.weight',
    'out.bias': 'linear_out.bias',
}
JAMBA = MAMBA | {
    'dt_norm.weight': 'dt_layernorm.weight',
    'B_norm.weight': 'b_layernorm.weight',
    'C_norm.weight': 'c_layernorm.weight',
}


def biased(layer, find, x):
  """Bloom's attention, with the bias and the mask of its model."""
  del find
  T = x.shape[1]
  alibi = BLOOM_CODE.build_alibi_tensor(torch.ones(x.shape[:2]), N, x.dtype)
  mask = torch.full((T, T), -torch.inf).triu(1)
  return layer(x, torch.zeros_like(x), alibi, mask)[0]


def recurrent_block(layer, find, x):
  del find
  positions = torch.arange(x.shape[1])[None]
  return layer(x, positions, None, use_cache=False)[0]


QWEN3 = functools.partial(
    Model, 'qwen3', 'Qwen3', 'Attention', GROUPED, 'causal')

MODELS = {
    'llama': Model(
        'llama', 'Llama', 'Attention', GROUPED,
        'causal', ROTARY, PROJECTIONS),
    # Their norm comes before the rotation and ours after it: a rotation keeps
    # lengths, and their weights are constant.
    'qwen3': QWEN3(
        ROTARY | dict(use_qk_norm=True), PROJECTIONS,
        constants=dict.fromkeys(QWEN_NORMS, 1.0)),
    'qwen3-scaled': QWEN3(
        ROTARY | dict(use_qk_norm=True, use_qk_norm_scale=True), QWEN3_SCALED,
        constants=QWEN_NORMS),
    # The weights of its norms are what they add to 1.
    'qwen3_next': Model(
        'qwen3_next', 'Qwen3Next', 'Attention',
        GROUPED | dict(partial_rotary_factor=0.5),
        'causal', ROTARY | dict(
            use_qk_norm=True, rope_fraction=0.5, attn_gate='element'),
        QWEN3_NEXT, constants=dict.fromkeys(QWEN_NORMS, 0.0)),
    'gemma2': Model(
        'gemma2', 'Gemma2', 'Attention',
        GROUPED | dict(attn_logit_softcapping=CAP, sliding_window=WINDOW,
                       query_pre_attn_scalar=GEMMA_SCALAR),
        'causal', ROTARY | dict(attn_logit_softcapping=CAP, window_size=WINDOW),
        GEMMA2),
    'gpt_oss': Model(
        'gpt_oss', 'GptOss', 'Attention',
        GROUPED | dict(attention_bias=True, sliding_window=WINDOW),
        'causal', ROTARY | dict(
            bias=True, window_size=WINDOW, use_flash_lobo=True,
            use_flash_lobo_per_head=True),
        GPT_OSS),
    'diffllama': Model(
        'diffllama', 'DiffLlama', 'Attention',
        ATTENTION | dict(
            num_attention_heads=2 * N, num_key_value_heads=2 * K,
            head_dim=H // 2),
        'differential', ROTARY, DIFFLLAMA),
    'bloom': Model(
        'bloom', 'Bloom', 'Attention',
        dict(hidden_size=D, n_head=N, n_layer=1, attn_implementation='eager'),
        'causal', dict(bias=True, use_alibi=True), BLOOM, call=biased),
    'deepseek_v2': Model(
        'deepseek_v2', 'DeepseekV2', 'Attention',
        ATTENTION | dict(
            attention_bias=True, q_lora_rank=None, kv_lora_rank=R,
            qk_nope_head_dim=H, qk_rope_head_dim=r, v_head_dim=H),
        'mla', dict(bias=True, rope_base=BASE, mla_latent_dim=R,
                    mla_rotary_dim=r),
        DEEPSEEK_V2),
    'mamba': Model(
        'mamba', 'Mamba', 'Mixer',
        dict(hidden_size=D, state_size=M, expand=E // D, conv_kernel=W,
             time_step_rank=DT_RANK, use_bias=True, num_hidden_layers=1,
             use_associative_scan=False),
        'ssm', dict(ssm_inner_norm=False, ssm_io_bias=True,
                    ssm_mamba_expand=E // D, ssm_conv_kernel_size=W,
                    ssm_dt_rank=DT_RANK, ssm_d_state=M),
        MAMBA, call=alone),
    'jamba': Model(
        'jamba', 'Jamba', 'MambaMixer',
        dict(hidden_size=D, mamba_d_state=M, mamba_expand=E // D,
             mamba_d_conv=W, mamba_dt_rank=DT_RANK, mamba_proj_bias=True,
             num_hidden_layers=1, use_associative_scan=False),
        'ssm', dict(ssm_io_bias=True, ssm_mamba_expand=E // D,
                    ssm_conv_kernel_size=W, ssm_dt_rank=DT_RANK,
                    ssm_d_state=M),
        JAMBA, without=('y_norm',), call=alone),  # Hymba's.
    'mamba2': Model(
        'mamba2', 'Mamba2', 'Mixer',
        dict(hidden_size=D, state_size=M, expand=E // D, head_dim=H,
             num_heads=E // H, n_groups=2, conv_kernel=W, use_bias=True,
             time_step_limit=STEPS, chunk_size=8, num_hidden_layers=1),
        'mamba2', dict(
            bias=True, mamba2_expand=E // D, mamba2_head_dim=H,
            mamba2_d_state=M, mamba2_n_groups=2, mamba2_conv_kernel_size=W,
            mamba2_dt_at_least=STEPS[0], mamba2_dt_at_most=STEPS[1]),
        MAMBA2, call=alone),
    'recurrent_gemma': Model(
        'recurrent_gemma', 'RecurrentGemma', 'RecurrentBlock',
        dict(hidden_size=D, lru_width=D, conv1d_width=W, num_attention_heads=N,
             num_hidden_layers=1),
        'rglru', dict(bias=True, rglru_conv_kernel_size=W),
        GRIFFIN, call=recurrent_block),
}


def inputs():
  return np.array(cases.inputs(T))


@pytest.mark.parametrize('n_head', [1, 2, 3, 6, 8, 12, 16, 40])
def test_same_alibi_slopes(n_head):
  theirs = BLOOM_CODE._get_alibi_slopes(n_head, 'cpu')
  np.testing.assert_allclose(
      alibi_slopes(n_head), layers.numpy(theirs), rtol=2e-6)


@functools.cache
def pair(name):
  """(our Attention, their layer as a function of float32 [B,T,D])."""
  mixer, _, theirs = layers.build(MODELS[name])
  return mixer, lambda x: layers.numpy(theirs(torch.tensor(x)))


each = pytest.mark.parametrize('name', MODELS)


@each
def test_same_outputs(name):
  mixer, theirs = pair(name)
  x = inputs()
  agree(layers.plain(mixer, x), theirs(x))


@each
def test_packed_documents_are_separate_calls(name):
  mixer, theirs = pair(name)
  x, lengths = inputs(), (7, 10)
  documents = np.split(x, [lengths[0]], axis=1)
  agree(layers.packed(mixer, x, lengths),
        np.concatenate([theirs(part) for part in documents], 1))


@each
def test_decoding_is_one_call(name):
  """With the state: mla in its absorbed form, windows in a ring."""
  mixer, theirs = pair(name)
  x = inputs()
  agree(layers.decoded(mixer, x, 9), theirs(x))
