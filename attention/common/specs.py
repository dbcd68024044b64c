"""Layers: which mixer each has, and the flags that are its own.

An entry of `attention_list` is a variant's name, with flags of its own in
parentheses where it has any, and repeated by a number in front:

  3*causal(window_size=128) causal(use_rotary_embeddings=false)
"""

import dataclasses
import re

from attention.common.options import option, read_pairs

MOST = 10_000  # As n_layer.
_ENTRY = re.compile(r'(?:(\d+)\*)?(\w+)(?:\((.*)\))?', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What any layer may have of its own, beside the flags of its variant."""
  n_head: int | None = option(None, 'query heads of the layer', at_least=1)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """The mixer of a layer.

  Attributes:
    variant: its name.
    flags: pairs of a flag and its value, of those that are the layer's own.
  """
  variant: str
  flags: tuple = ()

  def __str__(self):
    own = ', '.join(f'{flag}={value_text(value)}' for flag, value in self.flags)
    return f'{self.variant}({own})' if own else self.variant

  def options(self, module, config):
    """The Options of the variant's module for this layer."""
    own = dict(self.flags)
    return module.Options(**{
        field.name: own.get(field.name, config[field.name])
        for field in dataclasses.fields(module.Options)})

  def config(self, config):
    """The model's flags as this layer has them."""
    own = {k: v for k, v in self.flags if k in Shape.__dataclass_fields__}
    if not own:
      return config
    config = config.copy_and_resolve_references()
    config.update(own)
    return config

  def without(self, flags):
    """The same layer without some flags of its own."""
    return LayerSpec(self.variant, tuple(
        pair for pair in self.flags if pair[0] not in flags))


def parse(entry, get):
  """The LayerSpecs of an entry of attention_list.

  Args:
    entry: text, as above.
    get: the module of a variant, by its name.

  Raises:
    ValueError: one line that names the entry and what is wrong with it.
  """
  found = _ENTRY.fullmatch(entry.strip()) if isinstance(entry, str) else None
  if not found:
    raise ValueError(
        f'attention_list: {entry!r} is no layer: write a name, '
        "name(flag=value, ...) or 3*name, such as 'causal(window_size=128)'")
  count, name, text = found.groups()
  fields = {f.name: f for group in (Shape, get(name).Options)
            for f in dataclasses.fields(group)}
  own = read_pairs(
      text or '', fields, unknown=f'attention_list: {name} has no flag',
      where=f'attention_list: {entry}')
  if not 1 <= int(count or 1) <= MOST:
    raise ValueError(f'attention_list: {entry}: repeat it at least once, and '
                     f'at most {MOST} times')
  return (LayerSpec(name, tuple(sorted(own.items()))),) * int(count or 1)


def shortest(specs):
  """Text of layers, runs of equal ones as 3*name."""
  runs = []
  for spec in map(str, specs):
    if runs and runs[-1][1] == spec:
      runs[-1][0] += 1
    else:
      runs.append([1, spec])
  return ' '.join(f'{n}*{spec}' if n > 1 else spec for n, spec in runs)


def period(specs):
  """The shortest beginning of which all layers are repetitions, cut at last."""
  return next(specs[:n] for n in range(1, len(specs) + 1) if all(
      spec == specs[i % n] for i, spec in enumerate(specs)))


def value_text(value):
  """The value of a flag as it is written."""
  return str(value).lower() if isinstance(value, bool | None) else value
