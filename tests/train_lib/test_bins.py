"""What is in a train.bin: ids of 16 or 32 bits, and nothing else."""

import pickle

import numpy as np
import pytest

from train_lib import bins, corpus, data

RNG = np.random.default_rng(0)
# Vocabularies whose ids might be taken for other numbers.
IDS = {
    'dna': RNG.integers(0, 4, 4000), 'char': RNG.integers(0, 65, 4000),
    'zipf': np.minimum(RNG.zipf(1.2, 4000), 50256),
    'gpt2': RNG.integers(0, 50257, 4000), 'zero': np.zeros(4000, int),
    'few': np.array([3, 0, 3, 0]),
}
WIDE = {'llama': RNG.integers(0, 128256, 4000),
        'zipf': np.minimum(RNG.zipf(1.2, 4000), 128255)}


def write(folder, ids, kind, meta=None):
  for name in ('train', 'val'):
    ids.astype(kind).tofile(folder / f'{name}.bin')
  if meta is not None:
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
  return str(folder)


@pytest.mark.parametrize('name', IDS)
@pytest.mark.parametrize('dtype', bins.DTYPES)
def test_ids_are_read(tmp_path, name, dtype):
  dataset = corpus.load(
      write(tmp_path, IDS[name], dtype), bin_dtype=dtype)
  assert (dataset.train == IDS[name]).all()
  assert dataset.vocab_size == IDS[name].max() + 1


def test_the_meta_may_say_how_wide_they_are(tmp_path):
  folder = write(tmp_path, WIDE['llama'], 'uint32',
                 dict(vocab_size=128256, dtype='uint32'))
  dataset = corpus.load(folder)
  assert (dataset.val == WIDE['llama']).all()
  assert dataset.vocab_size == 128256
  write(tmp_path, WIDE['llama'], 'uint32', dict(vocab_size=9, dtype='int7'))
  with pytest.raises(ValueError, match="says dtype 'int7', which must be"):
    corpus.load(folder)


@pytest.mark.parametrize('kind, dtype, message', [
    ('uint32', 'uint16', 'looks like uint32, not uint16: give --bin_dtype='),
    ('uint64', 'uint16', 'looks like uint32, not uint16'),
    ('uint64', 'uint32', 'looks like uint64, not uint32: write it again'),
    ('uint16', 'uint32', 'looks like uint16, not uint32: give --bin_dtype='),
    ('float32', 'uint16', 'looks like float32, not uint16: write it again'),
    ('float32', 'uint32', 'looks like float32'),
    ('float64', 'uint16', 'looks like float64'),
    ('float64', 'uint32', 'looks like float64')])
@pytest.mark.parametrize('name', ['char', 'zipf', 'gpt2'])
def test_other_numbers_are_told_from_ids(tmp_path, name, kind, dtype, message):
  folder = write(tmp_path, IDS[name], kind)
  with pytest.raises(ValueError, match=message) as error:
    corpus.load(folder, bin_dtype=dtype)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', WIDE)
def test_a_large_vocabulary_is_told_from_a_small_one(tmp_path, name):
  folder = write(tmp_path, WIDE[name], 'uint32')
  with pytest.raises(ValueError, match='--bin_dtype=uint32'):
    corpus.load(folder)
  assert corpus.load(folder, bin_dtype='uint32').vocab_size > 65536


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
  dataset = corpus.load(write(tmp_path, IDS['gpt2'], 'uint16'))
  for name in ('train', 'val'):
    with open(tmp_path / f'{name}.bin', 'r+b') as file:
      file.truncate(100)
  shape = dict(rows=slice(None), batch_size=2, block_size=8)
  for batch in (lambda: data.train_batch(dataset, step=0, seed=0, **shape),
                lambda: data.eval_batch(dataset, index=0, **shape),
                lambda: data.full_batch(dataset, index=0, **shape)):
    with pytest.raises(ValueError, match='had 8000 bytes and has 100'):
      batch()


def test_the_flag_is_for_such_files_alone(tmp_path):
  with pytest.raises(ValueError, match='bin_dtype=uint32 has no effect'):
    corpus.load('pydoc', bin_dtype='uint32')
