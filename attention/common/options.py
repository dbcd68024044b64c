"""Flags: how they are declared, and those that several variants honour.

A flag's name, type, default, range, choices and help live in its field and
nowhere else. A variant's `Options` inherits the groups it honours, so the
fields of its Options are exactly the flags it reads.
"""

import dataclasses
import difflib
import functools
import math

INT_MAX = 2 ** 31 - 1
TRUE, FALSE = ('true', '1', 'yes', 'on'), ('false', '0', 'no', 'off')


def option(default, help, *, bare=None, runtime=False, needs=(), choices=None,
           empty=False, once=False, scales_state=None, at_least=None,
           above=None, at_most=None, below=None):
  """A flag: a dataclass field whose default and help text are the flag's.

  Args:
    default: the value; its type is the field's annotation.
    help: one line.
    bare: what the flag means without a value, or as `true`.
    runtime: of a model's flag, that it changes how the model is computed or
      trained, but not which model it is: a run may be resumed with another.
    needs: flags, of which one must be set, or be that of 'flag=value', in some
      layer that honours this one, for it to have an effect.
    choices: the values that it takes; none: any of its type.
    empty: of a text, that it may be empty.
    once: given twice it is an error; of other flags the last value counts.
    scales_state: of an integer that the decode state grows evenly with: 'width'
      for any, 'tokens' for one up to block_size. --match=state chooses it.
    at_least, above, at_most, below: bounds of a number, which is always finite
      and, if an integer, one of 32 bits: sizes and steps are.
  """
  bounds = {'at least': at_least, 'more than': above, 'at most': at_most,
            'less than': below}
  return dataclasses.field(default=default, metadata={
      'help': help, 'bare': bare, 'runtime': runtime, 'needs': needs,
      'choices': choices, 'empty': empty, 'once': once,
      'scales_state': scales_state,
      'bounds': {k: v for k, v in bounds.items() if v is not None}})


_HOLDS = {'at least': lambda x, y: x >= y, 'more than': lambda x, y: x > y,
          'at most': lambda x, y: x <= y, 'less than': lambda x, y: x < y}


def types(field):
  """(type, whether the flag may be none) of a flag."""
  options = getattr(field.type, '__args__', (field.type,))
  kinds = [t for t in options if t is not type(None)]
  return kinds[0], len(options) > len(kinds)


def nearest(name, known):
  """', did you mean ...?' or nothing."""
  near = difflib.get_close_matches(str(name), map(str, known), 1)
  return f', did you mean {near[0]}?' if near else ''


def check(field, value):
  """Raises ValueError for a value out of a flag's range or choices."""
  kind, optional = types(field)
  if value is None and optional:
    return
  if kind in (int, float):
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
      raise ValueError(f'{field.name}={value!r} is not {takes(field)}')
    wanted = [f'{word} {bound}' for word, bound in
              field.metadata['bounds'].items()]
    if not abs(value) < math.inf or kind is int and abs(value) > INT_MAX:
      wanted.append(f'at most {INT_MAX}' if kind is int else 'a finite number')
    elif all(_HOLDS[word](value, bound)
             for word, bound in field.metadata['bounds'].items()):
      return
    raise ValueError(f'{field.name} ({value}) must be ' + ' and '.join(wanted)
                     + (', or none' if optional else ''))
  if not isinstance(value, kind):
    raise ValueError(f'{field.name}={value!r} is not {takes(field)}')
  choices = field.metadata['choices']
  if choices is not None and value not in choices:
    raise ValueError(f'unknown {field.name} {value!r}{nearest(value, choices)}'
                     f' known: {", ".join(choices)}')
  if value == '' and not field.metadata['empty']:
    raise ValueError(f'{field.name} is empty: {field.metadata["help"]}')


def convert(field, text):
  """The value of a flag from its text (None: the flag stood alone)."""
  kind, optional = types(field)
  bare, help = field.metadata['bare'], field.metadata['help']
  if text is None:
    text = 'true' if kind is bool or bare is not None else None
  if text is None:
    raise ValueError(f'{field.name} needs a value: {help}')
  if kind is str:
    return None if optional and text.lower() == 'none' else text
  low = text.strip().lower()
  if optional and low in ('none', ''):
    return None
  if bare is not None and low in ('true', 'false'):
    return bare if low == 'true' else None
  try:
    if kind is bool:
      return {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[low]
    if kind is tuple:
      return split_list(text)
    value = kind(text)
    return None if bare is not None and value == 0 else value
  except (KeyError, ValueError):
    raise ValueError(
        f'{field.name}={text} is not {takes(field)}: {help}') from None


def split_list(text):
  """The entries of a list, at commas and spaces outside of parentheses."""
  entries, depth = [''], 0
  for character in text:
    depth += (character == '(') - (character == ')')
    if depth == 0 and (character == ',' or character.isspace()):
      entries.append('')
    else:
      entries[-1] += character
  return tuple(filter(None, entries))


def read_pairs(text, fields, *, unknown, where):
  """{name: value} of a text such as 'pairs=8, length=64'.

  Args:
    text: as above; a name alone is what its field means bare.
    fields: {name: field} of those that there are.
    unknown: how the error for another name begins.
    where: how the error for a bad value begins.

  Raises:
    ValueError: one line on the first that does not fit.
  """
  found = {}
  for pair in split_list(text):
    name, equals, value = pair.partition('=')
    if name not in fields:
      raise ValueError(f'{unknown} {name!r}{nearest(name, fields)} known: '
                       f'{", ".join(fields) or "none"}')
    try:
      found[name] = convert(fields[name], value if equals else None)
      check(fields[name], found[name])
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
  return found


def text(field):
  """The help of a flag, with its choices."""
  choices = field.metadata['choices']
  return field.metadata['help'] + (
      f' ({", ".join(choices)})' if choices else '')


def takes(field):
  """What a flag's type is called."""
  kind, optional = types(field)
  return {bool: 'true or false', int: 'an integer', float: 'a number',
          tuple: 'a list', str: 'a text'}[kind] + ' or none' * optional


@dataclasses.dataclass(frozen=True)
class Flags:
  """What every group of flags is: checked when it is made."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      check(field, getattr(self, field.name))


@dataclasses.dataclass(frozen=True)
class Kernel(Flags):
  attention_kernel: str = option(
      'auto', 'implementation of the attention kernels; a named one never '
      'falls back', runtime=True,
      choices=('auto', 'xla', 'tpu', 'gpu', 'cudnn'))


@dataclasses.dataclass(frozen=True)
class Flash(Kernel):
  disable_flash_attention: bool = option(
      False, 'materialise the scores instead of using the flash kernel',
      runtime=True)

  @property
  def implementation(self):
    """The flash implementation that these flags ask for."""
    return 'plain' if self.disable_flash_attention else self.attention_kernel

  def __post_init__(self):
    super().__post_init__()
    if self.disable_flash_attention and self.attention_kernel != 'auto':
      raise ValueError(
          'disable_flash_attention contradicts attention_kernel='
          f'{self.attention_kernel}: drop one of them')


_rope_base = functools.partial(
    option, 10000.0, 'longest wavelength of the rotary embeddings / 2 pi',
    above=0)


@dataclasses.dataclass(frozen=True)
class RopeBase(Flags):
  """Of variants that always rotate."""
  rope_base: float = _rope_base()


@dataclasses.dataclass(frozen=True)
class Rotary(Flags):
  """Of variants that rotate when told to."""
  use_rotary_embeddings: bool = option(
      False, 'rotate queries and keys by their positions')
  rope_base: float = _rope_base(needs=('use_rotary_embeddings',))
  rope_fraction: float = option(
      1.0, 'part of the head width, its first numbers, that is rotated; '
      'rounded down to an even number, at least 2',
      needs=('use_rotary_embeddings',), above=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class GroupedQueries(Flags):
  n_kv_group: int | None = option(
      None, 'key/value heads, a divisor of n_head; none: n_head', at_least=1)

  def kv_heads(self, n_head):
    """K, which divides n_head."""
    return divisor('n_kv_group', self.n_kv_group or n_head, n_head)


def divisor(flag, groups, n_head, *, name='n_head'):
  """groups; ValueError unless n_head heads fall into so many of one size."""
  if n_head % groups:
    *some, last = [str(d) for d in range(1, n_head + 1) if n_head % d == 0]
    raise ValueError(f'{flag} ({groups}) must divide {name} ({n_head}): use '
                     + ' or '.join(filter(None, (', '.join(some), last))))
  return groups


@dataclasses.dataclass(frozen=True)
class PlainQKNorm(Flags):
  use_qk_norm: bool = option(
      False, 'RMS-normalise queries and keys over the head width')


@dataclasses.dataclass(frozen=True)
class QKNorm(PlainQKNorm):
  use_qk_norm_scale: bool = option(
      False, 'with use_qk_norm: scores are g cos(q, k) with a learned g')

  def __post_init__(self):
    super().__post_init__()
    if self.use_qk_norm_scale and not self.use_qk_norm:
      raise ValueError('use_qk_norm_scale needs use_qk_norm: it scales the '
                       'cosine that the norm makes of the score')


@dataclasses.dataclass(frozen=True)
class Softcap(Flags):
  attn_logit_softcapping: float | None = option(
      None, 'scores become cap tanh(score / cap); bare flag: 50, none: off',
      bare=50.0, at_least=0)

  @property
  def softcap(self):
    """The bound of the scores, or 0."""
    return self.attn_logit_softcapping or 0.0


@dataclasses.dataclass(frozen=True)
class OutputGate(Flags):
  attn_gate: str = option(
      'none', 'sigmoid gate on the heads, computed from the input of the '
      'layer: one number a head, or one an element',
      choices=('none', 'head', 'element'))


@dataclasses.dataclass(frozen=True)
class Exclusive(Flags):
  attn_xsa: bool = option(
      False, 'exclusive self attention: heads return nothing along the '
      "token's own value")


@dataclasses.dataclass(frozen=True)
class ScoreBias(Flags):
  use_alibi: bool = option(
      False, 'scores fall linearly with distance, by a fixed slope a head')
  use_forget_gate: bool = option(
      False, 'scores fall by the logs of learned, data-dependent forget gates '
      'between key and query (FoX)')
  forget_gate_bias_init: float = option(
      0.0, 'initial bias of the forget gates; 0: they start at 1/2, as '
      'published; 4: near 1', needs=('use_forget_gate',))


@dataclasses.dataclass(frozen=True)
class Window(Flags):
  window_size: int | None = option(
      None, 'tokens that a query sees, itself included; none: all', at_least=1,
      scales_state='tokens')

  @property
  def window(self):
    """The tokens that a query sees, or 0: all."""
    return self.window_size or 0


@dataclasses.dataclass(frozen=True)
class Lobo(Flags):
  use_flash_lobo: bool = option(
      False, 'learned off-by-one softmax: e^lambda joins the denominator')
  use_flash_lobo_per_head: bool = option(
      False, 'with use_flash_lobo: one lambda per head instead of per layer')
  use_flash_obo_const: bool = option(
      False, 'off-by-one softmax with the constant flash_lobo_log_const')
  flash_lobo_log_const: float = option(
      0.0, 'initial (or constant) lambda of the off-by-one softmax',
      needs=('use_flash_lobo', 'use_flash_obo_const'))

  def __post_init__(self):
    super().__post_init__()
    if self.use_flash_lobo_per_head and self.use_flash_obo_const:
      raise ValueError('use_flash_lobo_per_head contradicts '
                       'use_flash_obo_const, one constant: drop one of them')
    if self.use_flash_lobo_per_head and not self.use_flash_lobo:
      raise ValueError('use_flash_lobo_per_head needs use_flash_lobo')
    if self.use_flash_lobo and self.use_flash_obo_const:
      raise ValueError('use_flash_lobo learns lambda, use_flash_obo_const '
                       'fixes it: drop one of them')
