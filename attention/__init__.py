"""Attention variants: one file each, chosen by name.

Letters, used in every einsum and every shape of this project:

  B batch            N query heads         E ssm inner width
  T query steps      K key/value heads     M ssm state
  S key/value steps  G = N / K             R latent rank
  D model width      H query/key width     W convolution width
  F mlp width        V value head width    C chunk
  L layers           Q latent queries      U token ids (vocabulary)
  P columns of one product that are split by use
  A addends of a number that float32 alone would round
  J heads of keys, or of queries, that the states of several heads share

They are the logical axes too: model.sharding lays arrays out on the mesh by
them.

A variant `attention/<name>.py` defines

  Options     a frozen dataclass: the flags it honours, with their defaults
  Attention   an nnx.Module that holds parameters and sub-modules only:
                __init__(self, config, options, *, rngs)
                __call__(self, x, ctx, state=None)  x [B,T,D] -> (y, state)
                init_state(self, batch, length)     a pytree
                flops(self, length)                 forward, per token

`ctx` is a model.sharding.Context. With a state the call continues from it for
T >= 1 tokens, so prefill and decode are the same call; without one the state
that it returns is not read. `length` is the number of tokens that a state must
be able to hold. A token never sees a later one, nor a token of another
document.

What is to be seen of a variant it may `ctx.record`, which costs nothing but in
Transformer.trace. What the ops of attention.common.ops record is there anyway.

Adding a variant is adding a file: its name is its flag value, and its
Options become command-line flags.
"""

import collections
import dataclasses
import functools
import importlib
import pkgutil

from attention.common import specs
from attention.common.options import nearest
from attention.common.specs import period, shortest

__all__ = ['build', 'check', 'flags', 'get', 'layers', 'listed',
           'mixes_values', 'names', 'period', 'shortest', 'state_flag', 'users']


@functools.cache
def names():
  """The variants: the modules of this package."""
  return tuple(
      m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def get(name):
  """The module of a variant; ValueError for an unknown name."""
  if name not in names():
    raise ValueError(f'unknown attention variant {name!r}'
                     f'{nearest(name, names())} known: {", ".join(names())}')
  return importlib.import_module(f'{__name__}.{name}')


def flags(name):
  """{flag: dataclass field} that a variant honours."""
  return {f.name: f for f in dataclasses.fields(get(name).Options)}


def users(flag):
  """The variants that honour a flag."""
  return tuple(name for name in names() if flag in flags(name))


def state_flag(name):
  """The flag that a variant's decode state grows with, or None.

  Of several the last: its own come after those that it shares with others.
  """
  return next((flag for flag, field in reversed(flags(name).items())
               if field.metadata['scales_state']), None)


def listed(config):
  """The LayerSpecs of attention_list, or the one of attention_variant."""
  entries = config.attention_list or (config.attention_variant,)
  return tuple(spec for entry in entries for spec in specs.parse(entry, get))


def layers(config):
  """The LayerSpec of every layer: those of the list tiled over n_layer."""
  found = listed(config)
  if len(found) > config.n_layer:
    raise ValueError(
        f'attention_list has {len(found)} layers for n_layer '
        f'({config.n_layer}): shorten the list or add layers')
  return tuple(found[i % len(found)] for i in range(config.n_layer))


def build(layer, config, *, rngs):
  """The mixer of a layer: a LayerSpec, or the text of one."""
  if isinstance(layer, str):
    layer, = specs.parse(layer, get)
  module, config = get(layer.variant), layer.config(config)
  return module.Attention(config, layer.options(module, config), rngs=rngs)


def mixes_values(config):
  """Whether layers mix the values of the first layer into their own.

  Raises:
    ValueError: the first layer is none of them, or has other heads.
  """
  def heads(layer):
    """(N, K) of a layer that mixes, or None."""
    options = layer.options(get(layer.variant), config)
    if 'causal_value_residual' not in flags(
        layer.variant) or not options.causal_value_residual:
      return None
    N = layer.config(config).n_head
    return N, options.kv_heads(N)
  first, *others = found = layers(config)
  for layer in others:
    if heads(layer) not in (None, heads(first)):
      raise ValueError(
          f'causal_value_residual of {layer} mixes in values of the first '
          f'layer, {first}: give that one the flag too, and the same n_head '
          'and n_kv_group')
  return any(map(heads, found))


def check(config):
  """Raises ValueError for layers that cannot be, and flags without effect."""
  used = dict.fromkeys(layers(config))
  effects = collections.defaultdict(list)  # {flag: whether it works, a layer}
  for layer in used:
    own = dict(layer.flags)
    options = layer.options(get(layer.variant), config)
    for flag, field in flags(layer.variant).items():
      works = _works(flag, options)
      if not works and own.get(flag, field.default) != field.default:
        raise ValueError(
            f'attention_list: {layer}: '
            + _no_effect(flag, own[flag], field.metadata['needs']))
      effects[flag].append(works)
  every = {flag: field for name in names() for flag, field in flags(
      name).items()}
  for flag, field in every.items():
    if config[flag] == field.default or any(effects[flag]):
      continue
    if effects[flag]:
      raise ValueError(
          _no_effect(flag, config[flag], field.metadata['needs']))
    raise ValueError(
        f'{flag}={config[flag]} has no effect: no layer honours it (variants '
        f'in use: {", ".join(sorted({x.variant for x in used}))}); drop the '
        f'flag or use one of {", ".join(users(flag))}')
  mixes_values(config)


def _works(flag, options):
  """Whether a flag has an effect: one that it needs is set and has one too."""
  needs = options.__dataclass_fields__[flag].metadata['needs']
  return not needs or any(_holds(need, options) for need in needs)


def _holds(need, options):
  """Whether a flag is set, or, of 'flag=value', is that; and has an effect."""
  flag, equals, value = need.partition('=')
  is_set = getattr(options, flag)
  return _works(flag, options) and (
      specs.value_text(is_set) == value if equals else bool(is_set))


def _no_effect(flag, value, needs):
  return (f'{flag}={value} has no effect without {" or ".join(needs)}: set '
          'both or neither')
