"""What the cases of all ops have: a row of sizes and options."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from tests.kernels.measure import TOLERANCE


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Row:
  """One case of an op.

  Attributes:
    id: part of the test's name.
    fast: the implementations that the fast tier tries it on.
    slow: likewise.
    has: the optional operands.
    dtype: of the operands in `low`. None: what the implementation takes.
    tolerance: of implementations that compute in float32.
    chip: the TPU that is pretended; '' has what all have.
    races: whether the TPU interpreter looks for them, which takes long.
    cut: arguments of what cuts an implementation's work small (see
      `implementations`). None: it is cut as everywhere.
  """
  id: str = ''
  fast: str = ''
  slow: str = ''
  has: str = ''
  dtype: type | None = None
  tolerance: float = TOLERANCE
  chip: str = ''
  races: bool = True
  cut: dict | None = dataclasses.field(default_factory=dict)
  B: int = 2
  T: int = 63

  operands: ClassVar[dict]  # {name: letters}
  optional: ClassVar[str]
  low: ClassVar[str]  # operands of the dtype, the others are float32
  series: ClassVar[str]  # operands that are cut where time is
  static: ClassVar[str]  # options
  results: ClassVar[dict]  # {name: letters} of the outputs
  state: ClassVar[dict] = {}  # {output: the operand it is handed on as}
  exactly: ClassVar[type] = np.float32  # in which its definition is exact

  @property
  def letters(self):
    """{name: letters} of the operands that the row has."""
    absent = set(self.optional.split()) - set(self.has.split())
    return {name: letters for name, letters in self.operands.items()
            if name not in absent}

  @property
  def outputs(self):
    """{name: letters} of the outputs that the row has."""
    return self.results

  @property
  def options(self):
    """What a program is compiled for: arguments that are no arrays, by name."""
    return {name: getattr(self, name) for name in self.static.split()}

  def shape(self, letters):
    return tuple(getattr(self, letter) for letter in letters)

  def draw(self):
    """{name: array}: the operands in float32, or what integers they are."""
    rng = np.random.default_rng(0)
    normal = {name: rng.standard_normal(self.shape(letters), np.float32)
              for name, letters in self.letters.items()}
    return {name: np.asarray(x) for name, x in self.suit(normal, rng).items()}

  def suit(self, normal, rng):
    """Makes operands of normal numbers."""
    raise NotImplementedError

  def document(self, first, last):
    """Operands for which [first, last) are the steps of one document."""
    ids = np.searchsorted([first, last], np.arange(self.T), side='right')
    marks = np.broadcast_to(np.diff(ids, prepend=0) > 0, (self.B, self.T))
    return dict(starts=marks)

  def cotangents(self):
    rng = np.random.default_rng(1)
    # A mean, so that the sums that are gradients do not cancel.
    return {name: 1 + rng.standard_normal(self.shape(letters), np.float32)
            for name, letters in self.outputs.items()}

  def arguments(self, dtype):
    """The operands, those in `low` cast to a dtype."""
    return {name: jnp.asarray(x, dtype if name in self.low.split() else None)
            for name, x in self.draw().items()}


def random_starts(rng, rows, time, *, every=9):
  """bool [rows,T]: starts at some multiples of `every`.

  In row 0 the document of before goes on; in the others one starts, so that
  the state before it does not count.
  """
  marks = np.zeros((rows, time), bool)
  marks[:, ::every] = rng.random((rows, -(-time // every))) < 0.7
  marks[:, 0] = np.arange(rows) > 0
  return marks
