"""The train.bin and val.bin of nanoGPT: token ids, one after another."""

import hashlib
import pathlib

import numpy as np

DTYPES = ('uint16', 'uint32')
SAMPLE = 1 << 16  # Numbers that are looked at to tell what a file holds.
FEW = 64  # Fewer numbers tell nothing.
LARGEST = 1 << 20  # No vocabulary has as many ids.


def read(folder, *, dtype):
  """The files of a folder, in one pass over them.

  Args:
    folder: the folder.
    dtype: of the ids: 'uint16' or 'uint32', little-endian.

  Returns:
    ({'train': ids, 'val': ids}, memory-mapped; {path: largest id}; the
    SHA-256 of both files).

  Raises:
    ValueError: a file is not there, or seems to hold other numbers.
  """
  splits, tops, sha256 = {}, {}, hashlib.sha256()
  kind = np.dtype(dtype).newbyteorder('<')
  for key in ('train', 'val'):
    path = pathlib.Path(folder) / f'{key}.bin'
    size = path.stat().st_size if path.is_file() else 0
    if not size or size % kind.itemsize:
      raise ValueError(f'--dataset={folder}: {path} has {size} bytes, where '
                       f'{dtype} token ids belong: write it again')
    splits[key] = tokens = np.memmap(path, kind, 'r')
    other = looks_like(tokens[:SAMPLE])
    if other:
      raise ValueError(
          f'--dataset={folder}: {path} looks like {other}, not {dtype}: '
          + (f'give --bin_dtype={other}' if other in DTYPES else
             'write it again as uint16 or uint32'))
    tops[path] = 0
    for start in range(0, len(tokens), 1 << 24):
      chunk = tokens[start:start + (1 << 24)]
      sha256.update(chunk)
      tops[path] = max(tops[path], int(chunk.max()))
  return splits, tops, sha256.hexdigest()


def looks_like(sample):
  """What numbers seem to have been written where ids were read, or None.

  Args:
    sample: the first ids of a file, as they were read.
  """
  raw, size = sample.tobytes(), sample.itemsize
  if len(sample) < FEW:
    return None
  for kind in ('float32', 'float64'):
    x = np.frombuffer(raw[:len(raw) // 8 * 8], kind)
    with np.errstate(invalid='ignore'):
      if x.any() and ((x == np.floor(x)) & (x >= 0) & (x < LARGEST)).all():
        return kind
  # The high half of a number twice as wide is (nearly) always 0.
  if int(sample[1::2].max()) << 8 < int(sample.max()):
    return f'uint{16 * size}'
  if size == 4 and sample.max() >= LARGEST:
    return 'uint16'
  return None
