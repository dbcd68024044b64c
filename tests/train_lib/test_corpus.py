"""Data sets: what is read, split, encoded, kept, and refused."""

import hashlib
import io
import pickle
import sys
import types

import numpy as np
import pytest

from train_lib import corpus, data, manual
from train_lib import tokenizer as tokenizer_lib

TEXT = ''.join(f'line {i} of the tale, café\n' for i in range(400))


@pytest.fixture
def text_file(tmp_path):
  path = tmp_path / 'tale.txt'
  path.write_bytes(TEXT.encode())
  return path


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / 'many'
  (root / 'b').mkdir(parents=True)
  (root / '.git').mkdir()
  for i, size in enumerate([300, 900, 250, 50, 500]):
    name = f'b/{i}.md' if i % 2 else f'{i}.txt'
    (root / name).write_text(f'{i}' * size)
  (root / '.git' / 'config').write_text('not this')
  return root


@pytest.fixture
def bins(tmp_path):
  """A function that writes a nanoGPT folder and returns it."""
  def write(meta=None, top=299, val=None):
    root = tmp_path / 'gpt'
    root.mkdir()
    tokens = np.arange(3000) % (top + 1)
    tokens.astype('<u2').tofile(root / 'train.bin')
    val = tokens[:500] if val is None else np.asarray(val)
    val.astype('<u2').tofile(root / 'val.bin')
    if meta is not None:
      (root / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return root
  return write


def refuse(message, name, **kwargs):
  with pytest.raises((ValueError, ImportError), match=message) as caught:
    corpus.load(str(name), **kwargs)
  assert '\n' not in str(caught.value)


def test_pydoc_is_one_corpus():
  dataset = corpus.load('pydoc')
  joined = np.concatenate([dataset.train, dataset.val])
  assert hashlib.sha256(joined).hexdigest() == dataset.sha256 == manual.SHA256
  assert dataset.train.dtype == np.uint8
  assert dataset.vocab_size == 256
  assert dataset.train_starts is None and dataset.notes == ()
  assert len(dataset.val) == pytest.approx(len(joined) / 10, rel=0.01)


def test_a_file_is_cut_by_characters_whatever_the_tokenizer(text_file):
  cut = int(0.9 * len(TEXT))
  for spec in ('byte', 'char'):
    dataset = corpus.load(str(text_file), tokenizer=spec)
    assert dataset.tokenizer.decode(dataset.train) == TEXT[:cut]
    assert dataset.tokenizer.decode(dataset.val) == TEXT[cut:]
    assert dataset.val_bytes == len(TEXT[cut:].encode())
    assert dataset.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_val_fraction_and_a_ready_tokenizer(text_file):
  ready = tokenizer_lib.Char(''.join(sorted(set(TEXT))) + 'Z')
  dataset = corpus.load(str(text_file), tokenizer=ready, val_fraction=0.5)
  assert dataset.tokenizer is ready
  assert len(dataset.val) == len(TEXT) // 2
  whole = corpus.load(str(text_file), val_fraction=0)
  assert (len(whole.train), len(whole.val)) == (len(TEXT.encode()), 0)


def test_char_knows_the_characters_of_validation(tmp_path):
  path = tmp_path / 'tail.txt'
  path.write_text('a' * 99 + 'z')
  assert corpus.load(str(path), tokenizer='char').tokenizer.chars == 'az'


def test_folder_reads_files_in_order_and_not_the_hidden(folder):
  dataset = corpus.load(str(folder), val_fraction=0)
  assert dataset.tokenizer.decode(dataset.train).split() == [
      '0' * 300, '2' * 250, '4' * 500, '1' * 900, '3' * 50]


def test_folder_says_what_it_leaves_out(folder):
  (folder / 'a.png').write_bytes(b'\x89PNG\0')
  (folder / 'empty').write_bytes(b'')
  dataset = corpus.load(str(folder))
  assert dataset.notes == (
      '2 of 7 files are left out, empty or no text: a.png, empty',)
  assert len(dataset.train) + len(dataset.val) == 2005


def test_what_a_ready_tokenizer_does_not_have_is_counted(text_file):
  lacking = tokenizer_lib.Char(''.join(sorted(set(TEXT) - {'é', 'a'})))
  dataset = corpus.load(str(text_file), tokenizer=lacking)
  kept = TEXT[int(0.9 * len(TEXT)):].replace('é', '').replace('a', '')
  assert dataset.tokenizer.decode(dataset.val) == kept
  assert dataset.lost == 40 * 3
  assert '120 of the' in dataset.notes[0]


def test_no_home_is_no_reason_to_stop(monkeypatch, text_file):
  monkeypatch.setattr(corpus.os, 'environ', {})
  monkeypatch.setattr(
      corpus.pathlib.Path, 'expanduser', lambda self: no_home())
  assert corpus.load(str(text_file)).lost == 0


def no_home():
  raise RuntimeError('Could not determine home directory.')


def test_packing_splits_at_the_nearest_document(folder):
  # Ends: 301 552 1053 1954 2005; 0.5 of the way is 1002.5.
  dataset = corpus.load(str(folder), packing=True, val_fraction=0.5)
  assert dataset.train_starts.tolist() == [0, 301, 552]
  assert len(dataset.train) == 1053
  assert dataset.val_starts.tolist() == [0, 901]
  refuse('--packing needs two documents', folder / '0.txt', packing=True)


def test_nanogpt_folder_without_meta(bins):
  root = bins()
  dataset = corpus.load(str(root))
  assert dataset.tokenizer == tokenizer_lib.Ids(300)
  assert isinstance(dataset.train, np.memmap)
  assert dataset.val_bytes is None
  raw = (root / 'train.bin').read_bytes() + (root / 'val.bin').read_bytes()
  assert dataset.sha256 == hashlib.sha256(raw).hexdigest()
  batch = data.train_batch(dataset, step=0, rows=slice(None), seed=0,
                           batch_size=8, block_size=16)
  assert ((np.diff(batch['tokens'], axis=1) - 1) % 300 == 0).all()


def test_nanogpt_folder_with_meta(bins):
  meta = dict(vocab_size=4, itos=dict(enumerate('\nabé')),
              stoi={'\n': 0, 'a': 1, 'b': 2, 'é': 3})
  dataset = corpus.load(str(bins(meta, top=3, val=[1, 3, 3])))
  assert dataset.tokenizer == tokenizer_lib.Char('\nabé')
  assert dataset.val_bytes == 5
  assert dataset.tokenizer.decode(dataset.val) == 'aéé'


@pytest.mark.parametrize('vocab_size, message', [
    (70000, r'vocabulary of 70000 cannot be in uint16'),
    (299, r'train.bin has token id 299, beyond .* of 299')])
def test_bad_vocabulary(bins, vocab_size, message):
  refuse(message, bins({'vocab_size': vocab_size}))


def test_bad_bins(bins):
  root = bins(val=[301])
  refuse(r'val.bin has token id 301, beyond the vocabulary of 300', root,
         tokenizer=tokenizer_lib.Ids(300))
  refuse(r'--tokenizer=char needs text, but .* holds ids', root,
         tokenizer='char')
  refuse(r'--tokenizer=bpe:300 needs text', root, tokenizer='bpe:300')
  refuse(r'--packing needs documents', root, packing=True)
  (root / 'train.bin').write_bytes(b'123')
  refuse(r'train.bin has 3 bytes', root)
  (root / 'train.bin').write_bytes(b'1234')
  (root / 'val.bin').unlink()
  refuse(r'val.bin has 0 bytes', root)


@pytest.mark.parametrize('raw, message', [
    (b'', 'is empty: give a text file'), (b'a\0b', 'is no UTF-8 text'),
    (b'\xff\xfe1', 'is no UTF-8 text')], ids=['empty', 'nul', 'latin'])
def test_bad_files(tmp_path, raw, message):
  path = tmp_path / 'bad.txt'
  path.write_bytes(raw)
  refuse(message, path)
  path.rename(tmp_path / 'inside.txt')
  refuse('has no text among its 1 files', tmp_path)


@pytest.mark.parametrize('name, kwargs, message', [
    ('pidoc', {}, r'pidoc is no file or folder.*did you mean pydoc\?'),
    ('no/such/file.txt', {}, r'is no file or folder: give one, or'),
    ('pydoc', dict(val_fraction=1.0), r'--val_fraction=1.0 must be 0 to'),
    ('pydoc', dict(val_fraction=-0.1), r'--val_fraction=-0.1 must be'),
    ('pydoc', dict(tokenizer='bite'), r'--tokenizer=bite is unknown')])
def test_bad_arguments(name, kwargs, message):
  refuse(message, name, **kwargs)


def fetch(monkeypatch, raw):
  """Makes downloads give `raw`, or raise it; returns the URLs asked for."""
  asked = []

  def urlopen(url, timeout):
    asked.append(url)
    if isinstance(raw, Exception):
      raise raw
    return io.BytesIO(raw)
  monkeypatch.setattr(corpus.urllib.request, 'urlopen', urlopen)
  return asked


def test_shakespeare_is_fetched_once(monkeypatch, tmp_path):
  monkeypatch.setattr(
      corpus, 'SHAKESPEARE_SHA256', hashlib.sha256(TEXT.encode()).hexdigest())
  asked = fetch(monkeypatch, TEXT.encode())
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for _ in range(2):
    dataset = corpus.load('shakespeare_char', tokenizer='char')
    assert len(dataset.train) == int(0.9 * len(TEXT))
  assert asked == [corpus.SHAKESPEARE_URL]
  kept = tmp_path / 'attention-lab' / 'tinyshakespeare.txt'
  assert kept.read_bytes() == TEXT.encode()
  kept.write_bytes(b'damaged')
  assert corpus.load('shakespeare_char') and len(asked) == 2
  assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize('reply, message', [
    (b'To be, or', 'another SHA-256'), (OSError('offline'), 'offline')],
    ids=['corrupted', 'offline'])
def test_shakespeare_refuses(monkeypatch, tmp_path, reply, message):
  fetch(monkeypatch, reply)
  refuse(message + r'; put that file at .*tinyshakespeare.txt',
         'shakespeare_char', cache_dir=tmp_path)
  assert not list(tmp_path.iterdir())


def hub(monkeypatch, load):
  library = types.SimpleNamespace(load_dataset=load)
  monkeypatch.setitem(sys.modules, 'datasets', library)


def test_hugging_face(monkeypatch):
  asked = []

  texts = {'train': {'text': ['one', 'two\n', 'three']}}
  hub(monkeypatch, lambda *args: asked.append(args) or texts)
  dataset = corpus.load('hf:me/tales', packing=True, val_fraction=0.4)
  assert bytes(dataset.train) == b'one\ntwo\n'
  assert bytes(dataset.val) == b'three\n'
  corpus.load('hf:me/tales/raw')
  assert asked == [('me/tales',), ('me/tales', 'raw')]


def test_hugging_face_keeps_its_own_validation(monkeypatch):
  hub(monkeypatch, lambda *_: {
      'train': {'text': ['one', 'two']}, 'validation': {'text': ['v']}})
  dataset = corpus.load('hf:me/tales', packing=True)
  assert bytes(dataset.train) == b'one\ntwo\n'
  assert bytes(dataset.val) == b'v\n'
  assert dataset.val_starts.tolist() == [0]


def test_hugging_face_refuses(monkeypatch):
  def offline(*_):
    raise ConnectionError("Couldn't reach\nthe Hub")
  hub(monkeypatch, offline)
  refuse(r"hf:me/x cannot be loaded \(ConnectionError: Couldn't reach the Hub",
         'hf:me/x')
  hub(monkeypatch, lambda *_: {'train': {'body': []}})
  refuse(r"KeyError: 'text'.*column 'text'", 'hf:me/x')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  refuse(r'pip install -e ".\[data\]"', 'hf:me/x')


def test_bpe_encoding_is_kept(text_file, tmp_path, monkeypatch):
  pytest.importorskip('tokenizers')
  cache = tmp_path / 'cache'
  load = lambda **kwargs: corpus.load(
      str(text_file), tokenizer='bpe:280', cache_dir=cache, **kwargs)
  first = load()
  assert first.train.dtype == np.uint16
  kept = sorted(cache.iterdir())
  assert [path.suffix for path in kept] == ['.npz', '.npz']
  with monkeypatch.context() as patch:
    patch.setattr(tokenizer_lib.Bpe, 'encode', None)
    again = load()
  np.testing.assert_array_equal(first.train, again.train)
  np.testing.assert_array_equal(first.val, again.val)
  assert first.tokenizer.decode(first.train) == TEXT[:int(0.9 * len(TEXT))]
  kept[0].write_bytes(b'PK damaged')
  np.testing.assert_array_equal(load().train, first.train)
  load(val_fraction=0.3)
  assert len(list(cache.iterdir())) == 4
