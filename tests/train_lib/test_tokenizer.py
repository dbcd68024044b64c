"""Tokenizers: exact round trips, streams, and every refusal."""

import json
import pickle
import sys

import numpy as np
import pytest

from train_lib import tokenizer as tokenizer_lib

TEXT = 'The cat sat.\nThe café was naïve: 5 €, 日本語 🙂.\n' * 40


def make(spec):
  if spec.startswith('bpe'):
    pytest.importorskip('tokenizers')
  if spec == 'ids':
    return tokenizer_lib.Ids(300)
  return tokenizer_lib.make(spec, [TEXT])


@pytest.mark.parametrize('spec', ['byte', 'char', 'bpe:300'])
def test_text_comes_back(spec):
  tokenizer = make(spec)
  ids = tokenizer.encode(TEXT)
  assert ids.ndim == 1
  assert ids.max() < tokenizer.vocab_size
  assert ids.dtype == (np.uint16 if tokenizer.vocab_size > 256 else np.uint8)
  assert tokenizer.decode(ids) == TEXT
  assert len(tokenizer.encode('')) == 0
  assert tokenizer.decode([]) == ''


@pytest.mark.parametrize('spec', ['byte', 'char', 'bpe:300', 'ids'])
def test_json_round_trip_is_exact(spec):
  tokenizer = make(spec)
  saved = json.loads(json.dumps(tokenizer.to_json()))
  again = tokenizer_lib.from_json(saved)
  assert again == tokenizer
  assert again.to_json() == tokenizer.to_json()
  assert again.vocab_size == tokenizer.vocab_size
  text = '7 12 299' if spec == 'ids' else TEXT
  np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize('spec', ['byte', 'char', 'bpe:300', 'ids'])
def test_stream_is_decode_in_pieces(spec):
  tokenizer = make(spec)
  ids = tokenizer.encode('7 12 299' if spec == 'ids' else TEXT)
  pieces = list(tokenizer_lib.stream(tokenizer, ids))
  assert ''.join(pieces) == tokenizer.decode(ids)
  assert len(pieces) > 2
  assert not any(tokenizer_lib.UNKNOWN in piece for piece in pieces)


def test_stream_gives_a_character_with_its_last_byte_and_is_lazy():
  def ids():
    yield from '€'.encode()
    yield ord('a')
    raise AssertionError('read too far')

  pieces = tokenizer_lib.stream(tokenizer_lib.Byte(), ids())
  assert next(pieces) == '€'
  assert next(pieces) == 'a'


@pytest.mark.parametrize('ids', [
    [0xe2, 0x82], [0xff, 0xff, 0x41, 0xe2], [0x80] * 9, [65, 300, -1, 66],
    [0xe2, 300, 0x82, 0xac]], ids=str)
def test_what_is_no_text_becomes_the_replacement_character(ids):
  tokenizer = tokenizer_lib.Byte()
  text = tokenizer.decode(ids)
  assert tokenizer_lib.UNKNOWN in text
  assert ''.join(tokenizer_lib.stream(tokenizer, ids)) == text


def test_byte_ids_are_the_bytes():
  ids = tokenizer_lib.Byte().encode('é\n')
  assert ids.tolist() == [0xc3, 0xa9, 0x0a]


def test_char_ids_are_places_in_the_sorted_set():
  tokenizer = tokenizer_lib.make('char', ['cab', 'z\n'])
  assert tokenizer.chars == '\nabcz'
  assert tokenizer.encode('zab').tolist() == [4, 1, 2]


def test_char_keeps_an_order_that_is_not_sorted():
  tokenizer = tokenizer_lib.Char('zaé')
  assert tokenizer.encode('éaz').tolist() == [2, 1, 0]
  assert tokenizer.decode([2, 1, 0, 3]) == 'éaz\ufffd'


@pytest.mark.parametrize('text', ['ab€', '€', 'a\x00'])
def test_char_names_what_it_does_not_know(text):
  tokenizer = tokenizer_lib.Char('ab')
  with pytest.raises(ValueError, match=r"has no '.*' \(U\+.*--tokenizer=byte"):
    tokenizer.encode(text)


def test_bpe_is_the_same_every_time_and_cuts_do_not_show(monkeypatch):
  tokenizers = pytest.importorskip('tokenizers')
  text = TEXT + 'a\n\n\n\n\nb\n  c \n\td\r\ne' * 40
  first = tokenizer_lib.make('bpe:290', [text])
  assert first.vocab_size == 290
  whole = tokenizers.Tokenizer.from_str(first.text).encode(text).ids
  monkeypatch.setattr(tokenizer_lib, 'CHUNK', 2)
  assert len(list(tokenizer_lib._chunks(text))) > 40
  assert tokenizer_lib.make('bpe:290', [text]) == first
  assert first.encode(text).tolist() == whole


def test_path_to_tokenizer_json(tmp_path):
  tokenizer = make('bpe:300')
  path = tmp_path / 'tokenizer.json'
  path.write_text(tokenizer.text)
  assert tokenizer_lib.make(str(path), []) == tokenizer


def test_stream_of_a_tokenizer_that_joins_words(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      {'[UNK]': 0, 'deep': 1, '##er': 2, 'sea': 3}, unk_token='[UNK]'))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.decoder = tokenizers.decoders.WordPiece()
  path = tmp_path / 'words.json'
  inner.save(str(path))
  tokenizer = tokenizer_lib.make(str(path), [])
  ids = tokenizer.encode('deeper sea')
  assert ids.tolist() == [1, 2, 3]
  assert list(tokenizer_lib.stream(tokenizer, ids)) == ['deep', 'er', ' sea']


@pytest.mark.parametrize('spec, message', [
    ('bite', r'bite is unknown: use byte, char.*did you mean byte\?'),
    ('bpe4096', r'did you mean bpe:4096\?'),
    ('gpt2', r'use byte, char, bpe:4096 or the path'),
    ('bpe:12', r'bpe:12 has no room for the 256 bytes'),
    ('nowhere/tokenizer.json', r'tokenizer.json is no tokenizer')])
def test_bad_specs(spec, message):
  if spec.endswith('json'):
    pytest.importorskip('tokenizers')
  with pytest.raises(ValueError, match=message) as caught:
    tokenizer_lib.make(spec, [TEXT])
  assert '\n' not in str(caught.value)


def test_a_json_file_that_is_no_tokenizer(tmp_path):
  pytest.importorskip('tokenizers')
  path = tmp_path / 'config.json'
  path.write_text('{"n_layer": 6}')
  with pytest.raises(ValueError, match='is no tokenizer .*give the path'):
    tokenizer_lib.make(str(path), [])


@pytest.mark.parametrize('text', ['12 cat', '300', '-1', '1.5'])
def test_ids_take_ids_alone(text):
  with pytest.raises(ValueError, match='is no token id.*from 0 to 299'):
    tokenizer_lib.Ids(300).encode(text)


def test_ids_are_written_with_spaces():
  tokenizer = tokenizer_lib.Ids(50257)
  assert tokenizer.encode('1 50256\n3').tolist() == [1, 50256, 3]
  assert tokenizer.decode(np.array([1, 50256, 3], np.uint16)) == '1 50256 3'


class Attack:

  def __reduce__(self):
    return print, ('this ran',)


def meta_of(chars, **changes):
  return dict(vocab_size=len(chars), stoi={c: i for i, c in enumerate(chars)},
              itos=dict(enumerate(chars))) | changes


@pytest.mark.parametrize('meta, message', [
    (Attack(), r'no plain meta.pkl .*builtins.print.*remove it'),
    (['a'], r'no plain meta.pkl'),
    (meta_of('abc', itos={0: 'a', 1: 'b'}), r'no plain meta.pkl \(KeyError'),
    (meta_of('abc', itos={0: 'b', 1: 'a', 2: 'c'}), r'do not pair'),
    (meta_of(['ab', 'c']), r'do not pair')],
    ids=['attack', 'list', 'hole', 'order', 'words'])
def test_bad_meta(tmp_path, capsys, meta, message):
  path = tmp_path / 'meta.pkl'
  path.write_bytes(pickle.dumps(meta))
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.from_meta(path)
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('meta, tokenizer', [
    (meta_of('zaé'), tokenizer_lib.Char('zaé')),
    (meta_of('ab', itos=['a', 'b']), tokenizer_lib.Char('ab')),
    ({'vocab_size': 50304}, tokenizer_lib.Ids(50304))],
    ids=['dict', 'list', 'ids'])
def test_good_meta(tmp_path, meta, tokenizer):
  path = tmp_path / 'meta.pkl'
  path.write_bytes(pickle.dumps(meta))
  assert tokenizer_lib.from_meta(path) == tokenizer


def test_without_the_library_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ImportError, match=r'pip install -e ".\[data\]"'):
    tokenizer_lib.make('bpe:300', [TEXT])
  tokenizer_lib.make('byte', [])


def saved(tmp_path, inner):
  path = tmp_path / 'saved.json'
  inner.save(str(path))
  return tokenizer_lib.make(str(path), [])


@pytest.fixture
def words():
  """A tokenizer of words in lower case, with an unknown one."""
  tokenizers = pytest.importorskip('tokenizers')
  inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      {'[UNK]': 0, 'deep': 1, '##er': 2, 'sea': 3}, unk_token='[UNK]'))
  inner.normalizer = tokenizers.normalizers.Lowercase()
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.decoder = tokenizers.decoders.WordPiece()
  return inner


def test_a_corpus_is_neither_cut_nor_filled_up(tmp_path, words):
  words.enable_truncation(2)
  words.enable_padding(length=9)
  assert saved(tmp_path, words).encode('deeper sea').tolist() == [1, 2, 3]


def test_what_is_lost_is_counted(tmp_path, words):
  tokenizer = saved(tmp_path, words)
  assert tokenizer.lost('deeper sea') == 0
  assert tokenizer.lost('Deeper sea') == 1  # The capital.
  assert tokenizer.lost('deep blue sea') == 4  # [UNK] has none of 'blue'.
  assert make('bpe:300').lost('Ünknown 日') == 0
  assert make('byte').lost('Ünknown 日') == 0
  char = tokenizer_lib.Char('ab')
  assert (char.lost('abcb'), char.kept('abcb'), char.kept('')) == (1, 'abb', '')


def test_what_follows_a_prompt_is_not_glued_to_it(tmp_path, words):
  for tokenizer, prompt, ids in (
      (tokenizer_lib.Ids(9), '1 2', [3, 4]),
      (saved(tmp_path, words), 'deep', [2, 3])):
    before = tokenizer.encode(prompt)
    pieces = list(tokenizer_lib.stream(tokenizer, ids, after=before))
    assert prompt + ''.join(pieces) == tokenizer.decode([*before, *ids])


def test_a_prompt_that_ends_within_a_character():
  pieces = tokenizer_lib.stream(
      tokenizer_lib.Byte(), '€'.encode()[2:] + b'a', after='€'.encode()[:2])
  assert list(pieces) == ['€', 'a']
