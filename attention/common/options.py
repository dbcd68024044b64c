"""Flags that several variants honour, declared once.

A variant's `Options` inherits the groups it honours, so the fields of its
Options are exactly the flags it reads. A flag's name, type, default and help
live in its field and nowhere else.
"""

import dataclasses
import functools


def option(default, help, *, bare=None, runtime=False, needs=None):
  """A flag: a dataclass field whose default and help text are the flag's.

  Args:
    default: the value; its type is the field's annotation.
    help: one line.
    bare: what the flag means without a value, or as `true`.
    runtime: of a model's flag, that it changes how the model is computed or
      trained, but not which model it is: a run may be resumed with another.
    needs: the name of a flag without which this one has no effect.
  """
  return dataclasses.field(default=default, metadata={
      'help': help, 'bare': bare, 'runtime': runtime, 'needs': needs})


@dataclasses.dataclass(frozen=True)
class Kernel:
  attention_kernel: str = option(
      'auto', 'implementation of the attention kernels: auto, xla, tpu, gpu '
      'or cudnn; a named one never falls back', runtime=True)


@dataclasses.dataclass(frozen=True)
class Flash(Kernel):
  disable_flash_attention: bool = option(
      False, 'materialise the scores instead of using the flash kernel',
      runtime=True)

  @property
  def implementation(self):
    """The flash implementation that these flags ask for."""
    if not self.disable_flash_attention:
      return self.attention_kernel
    if self.attention_kernel != 'auto':
      raise ValueError(
          'disable_flash_attention contradicts attention_kernel='
          f'{self.attention_kernel}: drop one of them')
    return 'plain'


_rope_base = functools.partial(
    option, 10000.0, 'longest wavelength of the rotary embeddings / 2 pi')


@dataclasses.dataclass(frozen=True)
class RopeBase:
  """Of variants that always rotate."""
  rope_base: float = _rope_base()


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Of variants that rotate when told to."""
  use_rotary_embeddings: bool = option(
      False, 'rotate queries and keys by their positions')
  rope_base: float = _rope_base(needs='use_rotary_embeddings')


@dataclasses.dataclass(frozen=True)
class GroupedQueries:
  n_kv_group: int | None = option(
      None, 'key/value heads, a divisor of n_head; none: n_head')


@dataclasses.dataclass(frozen=True)
class PlainQKNorm:
  use_qk_norm: bool = option(
      False, 'RMS-normalise queries and keys over the head width')


@dataclasses.dataclass(frozen=True)
class QKNorm(PlainQKNorm):
  use_qk_norm_scale: bool = option(
      False, 'with use_qk_norm: scores are g cos(q, k) with a learned g')


@dataclasses.dataclass(frozen=True)
class Softcap:
  attn_logit_softcapping: float | None = option(
      None, 'scores become cap tanh(score / cap); bare flag: 50, none: off',
      bare=50.0)


@dataclasses.dataclass(frozen=True)
class Window:
  window_size: int | None = option(
      None, 'tokens that a query sees, itself included; none: all')


@dataclasses.dataclass(frozen=True)
class Lobo:
  use_flash_lobo: bool = option(
      False, 'learned off-by-one softmax: e^lambda joins the denominator')
  use_flash_lobo_per_head: bool = option(
      False, 'with use_flash_lobo: one lambda per head instead of per layer')
  use_flash_obo_const: bool = option(
      False, 'off-by-one softmax with the constant flash_lobo_log_const')
  flash_lobo_log_const: float = option(
      0.0, 'initial (or constant) lambda of the off-by-one softmax')
