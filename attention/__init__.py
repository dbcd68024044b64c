"""Attention variants: one file each, chosen by name.

Letters, used in every einsum and every shape of this project:

  B batch            N query heads         E ssm inner width
  T query steps      K key/value heads     M ssm state
  S key/value steps  G = N / K             R latent rank
  D model width      H query/key width     W convolution width
  F mlp width        V value head width    C chunk
  L layers

A variant `attention/<name>.py` defines

  Options     a frozen dataclass: the flags it honours, with their defaults
  Attention   an nnx.Module that holds parameters and sub-modules only:
                __init__(self, config, options, *, rngs)
                __call__(self, x, ctx, state=None)  x [B,T,D] -> (y, state)
                init_state(self, batch, length)     a pytree
                flops(self, length)                 forward, per token

`ctx` is a model.layers.Context. With a state the call continues from it for
T >= 1 tokens, so prefill and decode are the same call. `length` is the number
of tokens that a state must be able to hold. A token never sees a later one,
nor a token of another segment.

Adding a variant is adding a file: its name is its flag value, and its
Options become command-line flags.
"""

import collections
import dataclasses
import difflib
import functools
import importlib
import pkgutil


@functools.cache
def names():
  """The variants: the modules of this package."""
  return tuple(
      m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def get(name):
  """The module of a variant; ValueError for an unknown name."""
  if name not in names():
    near = difflib.get_close_matches(name, names(), 1)
    raise ValueError(
        f'unknown attention variant {name!r}'
        + (f', did you mean {near[0]!r}?' if near else '')
        + f' known: {", ".join(names())}')
  return importlib.import_module(f'{__name__}.{name}')


def flags(name):
  """{flag: dataclass field} that a variant honours."""
  return {f.name: f for f in dataclasses.fields(get(name).Options)}


def layer_kinds(config):
  """The variant of every layer: attention_list tiled over n_layer."""
  period = tuple(config.attention_list or (config.attention_variant,))
  if len(period) > config.n_layer:
    raise ValueError(
        f'attention_list has {len(period)} entries for n_layer '
        f'({config.n_layer}): shorten the list or add layers')
  return tuple(period[i % len(period)] for i in range(config.n_layer))


def build(name, config, *, rngs):
  """The mixer of one layer."""
  module = get(name)
  options = module.Options(**{flag: config[flag] for flag in flags(name)})
  return module.Attention(config, options, rngs=rngs)


def check(config):
  """Raises if a flag was set that no layer of the model honours."""
  used = sorted(set(layer_kinds(config)))
  users = collections.defaultdict(list)  # {flag: its fields in use}
  for name in used:
    for flag, field in flags(name).items():
      users[flag].append(field)
  for flag in {flag: None for name in names() for flag in flags(name)}:
    able = [name for name in names() if flag in flags(name)]
    if config[flag] == flags(able[0])[flag].default:
      continue
    if not users[flag]:
      raise ValueError(
          f'{flag}={config[flag]} has no effect: no layer honours it '
          f'(variants in use: {", ".join(used)}); drop the flag or use '
          f'one of {", ".join(able)}')
    needs = [field.metadata['needs'] for field in users[flag]]
    if all(needs) and not any(config[other] for other in needs):
      raise ValueError(f'{flag}={config[flag]} has no effect without '
                       f'{needs[0]}: set both or neither')
