"""The cases of the contract: every variant with every flag that it has.

A case is a variant and some flags. They come from `attention.names()` and
from the table below, so that a new variant is picked up by being there, and a
new flag needs one row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attention
from attention.common.weights import VARIANTS
from configs import default
from model.sharding import Context

# {softmax_variant_attn: (flag, a value, what else it needs)}.
WEIGHTS = {
    'consmax': (
        ('consmax_initial_beta', 0.3, {}), ('consmax_initial_gamma', 2.0, {}),
        ('consmax_use_euler_base', False, {}),
        ('consmax_base', 3.0, dict(consmax_use_euler_base=False))),
    'consmax_v2': (
        ('consmax_v2_clamping', True, {}),
        ('consmax_v2_clamp_value', -2.4, dict(consmax_v2_clamping=True))),
    'saturatingconsmax': (
        ('consmax_saturation', -2.6, {}),
        ('consmax_learnable_beta', False, {}),
        ('consmax_learnable_gamma', False, {})),
    'polymax': (
        ('polymax_x_intercept', -0.05, {}), ('polymax_y_intercept', 0.5, {}),
        ('polymax_power', 1.5, {}), ('polymax_divisor', 2.0, {})),
    'exppolymax': (
        ('exppolymax_use_euler_base', False, {}),
        ('exppolymax_base', 2.0, dict(exppolymax_use_euler_base=False)),
        ('exppolymax_y_intercept', 0.5, {}), ('exppolymax_power', 1.0, {}),
        ('exppolymax_divisor', 2.0, {})),
    'relumax': (('relumax_divisor', 2.0, {}),),
    'relu2max': (('relu2max_divisor', 2.0, {}),),
    'sigmoidmax': (('sigmoidmax_divisor', 2.0, {}),),
    'softplus': (('softplus_divisor', 2.0, {}),),
    'squareplus': (('squareplus_divisor', 2.0, {}),),
    'sigsoftmax': (
        ('sigsoftmax_use_euler_base', False, {}),
        ('sigsoftmax_base', 3.0, dict(sigsoftmax_use_euler_base=False))),
    'strongermax': (
        ('strongermax_strength', 2.0, {}),
        ('strongermax_div_by_sum_of_terms', False, {}),
        ('strongermax_divisor', 2.0, {}),
        *((flag, value, dict(strongermax_div_by_sum_of_terms=False))
          for flag, value in (('strongermax_use_xmax', False),
                              ('strongermax_xmax_guess', 1.0))),
        ('strongermax_clamping', True, {}),
        ('strongermax_clamp_value', 0.01, dict(strongermax_clamping=True)),
        ('strongermax_obo', 0.5, {}),
        ('strongermax_use_learned_obo', True, {}),
        ('strongermax_use_learned_obo_per_head', True, {}),
        ('strongermax_temperature_factor', 2.0, {}),
        ('strongermax_use_learned_temperature_factor', True, {})),
    'pfla_softmax': (
        ('pfla_softmax_num_points', 5, {}),
        ('pfla_softmax_left_bound', -3.0, {}),
        ('pfla_softmax_right_bound', 4.0, {}),
        ('pfla_softmax_learn_x', True, {}),
        ('pfla_softmax_learn_y', False, {}),
        ('pfla_softmax_init_activation', 'softplus', {}),
        ('pfla_softmax_density', 'exp', {}),
        ('pfla_softmax_use_learned_divisor', True, {}),
        ('pfla_softmax_gamma_init', 2.0,
         dict(pfla_softmax_use_learned_divisor=True)),
        ('pfla_softmax_use_obo', True, {}),
        ('pfla_softmax_use_learned_obo', True,
         dict(pfla_softmax_use_obo=True)),
        ('pfla_softmax_obo', 0.5, dict(pfla_softmax_use_obo=True)),
        ('pfla_softmax_mode', 'quadratic', {})),
}

# {flag: its values that are not the default}. A pair (flags, needs) where
# something else must be set for the flag to mean anything: without `needs` it
# must raise. The first value joins the row of all flags at once.
SETTINGS = {
    'attention_kernel': [dict(attention_kernel='xla')],
    'disable_flash_attention': [dict(disable_flash_attention=True)],
    'n_kv_group': [dict(n_kv_group=2), dict(n_kv_group=1)],
    'use_rotary_embeddings': [dict(use_rotary_embeddings=True)],
    'rope_base': [(dict(rope_base=50.0), dict(use_rotary_embeddings=True))],
    'rope_fraction': [
        (dict(rope_fraction=0.6), dict(use_rotary_embeddings=True)),
        (dict(rope_fraction=0.1), dict(use_rotary_embeddings=True))],
    'use_qk_norm': [dict(use_qk_norm=True)],
    'use_qk_norm_scale': [
        (dict(use_qk_norm_scale=True), dict(use_qk_norm=True))],
    'attn_logit_softcapping': [dict(attn_logit_softcapping=0.7)],
    'attn_xsa': [dict(attn_xsa=True)],
    'attn_gate': [dict(attn_gate='element'), dict(attn_gate='head')],
    'window_size': [
        dict(window_size=4), dict(window_size=2), dict(window_size=1)],
    'use_alibi': [dict(use_alibi=True)],
    'use_forget_gate': [dict(use_forget_gate=True)],
    'forget_gate_bias_init': [
        (dict(forget_gate_bias_init=3.0), dict(use_forget_gate=True))],
    'use_flash_lobo': [dict(use_flash_lobo=True)],
    'use_flash_lobo_per_head': [
        (dict(use_flash_lobo_per_head=True), dict(use_flash_lobo=True))],
    'use_flash_obo_const': [dict(use_flash_obo_const=True)],
    'flash_lobo_log_const': [
        (dict(flash_lobo_log_const=1.5), dict(use_flash_lobo=True)),
        (dict(flash_lobo_log_const=-0.5), dict(use_flash_obo_const=True))],
    'softmax_variant_attn': [
        dict(softmax_variant_attn=name) for name in VARIANTS[1:]],
    'div_by_seq_len': [dict(div_by_seq_len=True)],
    **{flag: [(dict([(flag, value)]), dict(softmax_variant_attn=name, **needs))]
       for name, rows in WEIGHTS.items()
       for flag, value, needs in rows},
    'use_fire_embeddings': [dict(use_fire_embeddings=True)],
    **{flag: [(dict([(flag, value)]), dict(use_fire_embeddings=True))]
       for flag, value in (
           ('fire_log_bias', 1.5), ('fire_num_hidden_layers', 0),
           ('fire_mlp_width', 3), ('fire_init_c', 0.7), ('fire_init_L', 4.0),
           ('fire_outermost_sigma', True))},
    'mla_latent_dim': [dict(mla_latent_dim=5)],
    'mla_rotary_dim': [dict(mla_rotary_dim=6)],
    'use_mla_lobo': [dict(use_mla_lobo=True)],
    'mla_lobo_init': [(dict(mla_lobo_init=1.5), dict(use_mla_lobo=True))],
    'causal_value_residual': [dict(causal_value_residual=True)],
    'n_latent': [dict(n_latent=3)],
    'triadic_loops': [dict(triadic_loops=2), dict(triadic_loops=0)],
    'mod_fn': [dict(mod_fn=f'tm{i}') for i in (3, 1, 2, 4)],
    'co4_mode': [dict(co4_mode='exact')],
    'n_qk_head_dim': [dict(n_qk_head_dim=6)],
    'n_v_head_dim': [dict(n_v_head_dim=5)],
    'n_cproj': [dict(n_cproj=2)],
    'use_concat_heads': [dict(use_concat_heads=True)],
    'differential_lambda_init': [
        dict(differential_lambda_init=0.8), dict(differential_lambda_init=0.0)],
    'mamba2_expand': [dict(mamba2_expand=4)],
    'mamba2_head_dim': [dict(mamba2_head_dim=16)],
    'mamba2_d_state': [dict(mamba2_d_state=5)],
    'mamba2_n_groups': [dict(mamba2_n_groups=2)],
    'mamba2_conv_kernel_size': [
        dict(mamba2_conv_kernel_size=2), dict(mamba2_conv_kernel_size=1)],
    'mamba2_dt_at_least': [dict(mamba2_dt_at_least=0.01)],
    'mamba2_dt_at_most': [dict(mamba2_dt_at_most=0.02)],
    'retention_decay': [
        dict(retention_decay='data'), dict(retention_decay='lightning')],
    'retention_decay_power': [
        dict(retention_decay_power=0.5), dict(retention_decay_power=0.0)],
    'retention_expand_v': [dict(retention_expand_v=1)],
    'delta_beta_max': [dict(delta_beta_max=2.0)],
    'delta_expand_v': [dict(delta_expand_v=2)],
    'delta_conv_kernel_size': [
        dict(delta_conv_kernel_size=3), dict(delta_conv_kernel_size=1)],
    'gla_key_width': [dict(gla_key_width=3)],
    'gla_gate_rank': [dict(gla_gate_rank=2)],
    'hgrn2_lower_bound': [dict(hgrn2_lower_bound=0.4)],
    'rglru_width': [dict(rglru_width=24)],
    'rglru_conv_kernel_size': [
        dict(rglru_conv_kernel_size=2), dict(rglru_conv_kernel_size=1)],
    'ssm_mamba_expand': [dict(ssm_mamba_expand=1)],
    'ssm_conv_kernel_size': [
        dict(ssm_conv_kernel_size=4), dict(ssm_conv_kernel_size=1)],
    'ssm_dt_rank': [dict(ssm_dt_rank=3)],
    'ssm_d_state': [dict(ssm_d_state=5)],
    'ssm_io_bias': [dict(ssm_io_bias=True)],
    'ssm_inner_norm': [dict(ssm_inner_norm=False)],
}

# What a flag needs in one variant alone.
NEEDS = {
    ('co4', 'disable_flash_attention'): dict(co4_mode='exact'),
}

# Not part of the first row of many flags, as they exclude others of it, or
# leave nothing of a first token.
ALONE = ('attention_kernel', 'use_flash_obo_const', 'use_concat_heads',
         'attn_xsa', 'softmax_variant_attn',
         *(flag for rows in WEIGHTS.values() for flag, *_ in rows))

MODEL = dict(n_embd=32, n_head=4, n_layer=2, block_size=16, vocab_size=32,
             init_std=0.1)


@dataclasses.dataclass(frozen=True)
class Case:
  """A variant with some flags.

  `flag` is the one it is about, if any; else `number` tells it from others.
  """
  variant: str
  flag: str = ''
  flags: tuple = ()
  needs: tuple = ()
  number: int = 1

  def __str__(self):
    shown = [f'{k}={v}' for k, v in self.flags]
    many = [f'many{self.number}'] if shown else []
    return '-'.join([self.variant, *(shown if self.flag else many)])

  def base(self):
    """The same case without the flag that it is about."""
    return Case(self.variant, self.flag, self.needs)


def settings(variant, flag):
  """[(flags, needs)] of a flag in a variant; [] if it has no row."""
  rows = [row if isinstance(row, tuple) else (row, {})
          for row in SETTINGS.get(flag, [])]
  extra = NEEDS.get((variant, flag), {})
  known = attention.flags(variant)
  return [(flags, {**{k: v for k, v in needs.items() if k in known}, **extra})
          for flags, needs in rows]


def single(variant):
  """The cases of one flag at a time."""
  return [
      Case(variant, flag, tuple({**needs, **flags}.items()),
           tuple(needs.items()))
      for flag in attention.flags(variant)
      for flags, needs in settings(variant, flag)]


def main(variant):
  """The defaults, and most flags at once."""
  together = {}
  for flag in attention.flags(variant):
    if flag not in ALONE:
      for flags, needs in settings(variant, flag)[:1]:
        together |= {**needs, **flags}
  rows = [Case(variant)]
  return rows + [Case(variant, '', tuple(together.items()))] * bool(together)


def fits(variant, flags):
  """Whether flags can be set at once."""
  try:
    attention.check(config(attention_variant=variant, **flags))
  except ValueError:
    return False
  return True


def rest(variant):
  """Rows of flags until every value of main's and of `single` is in one.

  But for a window of one token, in which most others mean nothing. A row takes,
  in order, all that goes together with what it has.
  """
  covered = [dict(case.flags) for case in main(variant)]
  left = [dict(case.flags) for case in single(variant)
          if dict(case.flags).get('window_size') != 1]
  left = [flags for flags in left
          if not any(flags.items() <= row.items() for row in covered)]
  rows = []
  while left:
    row, later = {}, []
    for flags in left:
      same = all(row.get(flag, value) == value for flag, value in flags.items())
      if same and fits(variant, row | flags):
        row |= flags
      else:
        later.append(flags)
    assert len(later) < len(left), f'{variant} cannot be: {later[0]}'
    rows.append(Case(variant, '', tuple(row.items()), number=len(rows) + 2))
    left = later
  return rows


def shared(case):
  """Whether the flags are those of a module that another variant has too."""
  return case.variant == 'infinite' and 'softmax_variant_attn' in dict(
      case.flags)


def config(**flags):
  """A tiny model's config."""
  small = default.get_config()
  small.update({**MODEL, **flags})
  return small


@functools.cache
def build(case, **flags):
  """The case's Attention; the same numbers for the same parameters."""
  small = config(**{
      'attention_variant': case.variant, **dict(case.flags), **flags})
  attention.check(small)
  # Not compiled: cases share the operations of their initialisers.
  return attention.build(case.variant, small, rngs=nnx.Rngs(0))


def inputs(T, *, seed=0):
  """float32 [2,T,D]."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((2, T, MODEL['n_embd'])), jnp.float32)


def plain(mixer, x):
  """The outputs for one document a row."""
  return mixer(x, Context(counted(x)))[0]


def counted(x):
  return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


@functools.cache
def outputs(case):
  """plain(...) of the case on inputs(12)."""
  return np.asarray(jax.jit(plain)(build(case), inputs(12)))


def parameters(tree):
  """{path: array} of a module or of its gradient."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'):
          np.asarray(leaf) for path, leaf in leaves}


def close(got, want, tolerance=2e-5):
  """Asserts a small error, as a part of the largest wanted number."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  worst = np.abs(got - want).max() / max(np.abs(want).max(), 1e-6)
  assert worst <= tolerance, f'error {worst:.2g} > {tolerance}'


MAIN = [case for name in attention.names() for case in main(name)]
REST = [case for name in attention.names() for case in rest(name)]
SINGLE = [case for name in attention.names() for case in single(name)]
