"""How the TPU kernels of the selective scan cut their work."""

from typing import NamedTuple

from attention.kernels.mosaic_tpu import LANES, round_up


class Blocks(NamedTuple):
  """What one grid step computes, and how it is cut for the scheduler.

  Attributes:
    rows: rows of the batch.
    channels: whole vectors of them.
    chunk: steps, whole strips.
    strip: steps that are unrolled, whole vectors.
  """
  rows: int
  channels: int
  chunk: int
  strip: int

  @property
  def strips(self):
    return self.chunk // self.strip

  @property
  def streams(self):
    """(row, lanes) of each stream: 128 channels of a row."""
    return [(r, slice(first, first + LANES)) for r in range(self.rows)
            for first in range(0, self.channels, LANES)]


def sizes(B, T, E, M, *, strip=16, states=8192):
  """Returns the Blocks. Tests put a function with other sizes in its place.

  Args:
    B: rows of the batch.
    T: steps.
    E: channels.
    M: states, whole sublanes.
    strip: steps that are unrolled: the rows of a tile of bfloat16, too.
    states: channels times states of a block: eight vectors. With those of A
      and dA they leave half of the 64 registers to what a step computes.
  """
  channels = min(states // M // LANES * LANES, round_up(E, LANES))
  # Few channels: two rows of the batch at a time.
  rows = 2 if B % 2 == 0 and 2 * channels * M <= states else 1
  chunk = LANES if M < 64 and rows == 1 else LANES // 2
  return Blocks(rows, channels, min(chunk, round_up(T, strip)), strip)
