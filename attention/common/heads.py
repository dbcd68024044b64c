"""Heads: how wide they are, and the projections into and out of them."""

from model.layers import Einsum


def head_width(config, *, instead=''):
  """H, the width of heads that share n_embd.

  Args:
    config: the flags.
    instead: a flag that sets this width, if there is one.
  """
  if config.n_embd % config.n_head:
    raise ValueError(f'n_head ({config.n_head}) must divide n_embd '
                     f'({config.n_embd})'
                     + (f', or set {instead}' if instead else ''))
  return config.n_embd // config.n_head


def project(equation, config, *, heads, width, rngs):
  """A projection to heads, such as 'BTD,DNH->BTNH'."""
  return Einsum(equation, (config.n_embd, heads, width), std=config.init_std,
                bias=config.bias, rngs=rngs)


def qkv(config, *, groups, widths, rngs):
  """The projections to N queries and to so many keys and values.

  Args:
    config: the flags.
    groups: K.
    widths: (H, V).
    rngs: of nnx.
  """
  N, (H, V) = config.n_head, widths
  return (
      project('BTD,DNH->BTNH', config, heads=N, width=H, rngs=rngs),
      project('BTD,DKH->BTKH', config, heads=groups, width=H, rngs=rngs),
      project('BTD,DKV->BTKV', config, heads=groups, width=V, rngs=rngs))


def out(config, *, heads, width, rngs):
  """The projection of heads back to the model's width.

  GPT-2: the 2 L sums of the residual stream keep its variance.
  """
  return Einsum(
      'BTNV,NVD->BTD', (heads, width, config.n_embd), bias=config.bias,
      rngs=rngs, std=config.init_std / (2 * config.n_layer) ** 0.5)
