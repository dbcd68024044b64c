"""Tokenizers: text to integer ids and back, small enough for a checkpoint."""

import collections
import dataclasses
import difflib
import functools
import itertools
import pathlib
import pickle
import re

import numpy as np

SPECS = ('byte', 'char', 'bpe:4096')
UNKNOWN = '\ufffd'
CHUNK = 4096  # characters; longer strings are slower, a whole corpus far more
# The kind that may be cut into chunks; others may treat a start differently.
BYTELEVEL = ('"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,'
             '"trim_offsets":true,"use_regex":true}')


class Tokenizer:
  """Each has `vocab_size` and `encode(text) -> ids [T]`, and what is here."""

  @functools.cached_property
  def dtype(self):
    """The smallest unsigned integer type that holds every id."""
    return np.min_scalar_type(self.vocab_size - 1)

  def decode(self, ids):
    """Ids to text; U+FFFD stands for what is no UTF-8 and for unknown ids."""
    known = lambda token: 0 <= token < self.vocab_size
    runs = itertools.groupby(map(int, ids), known)
    return ''.join(self._decode([*run]) if inside else UNKNOWN * len([*run])
                   for inside, run in runs)

  def kept(self, text):
    """The text without what the tokenizer has no token for."""
    return text

  def lost(self, text):
    """How many characters of a text do not come back from its tokens."""
    back = self.decode(self.encode(self.kept(text)))
    return (collections.Counter(text) - collections.Counter(back)).total()

  def to_json(self):
    """A dict of strings and numbers from which from_json makes an equal one."""
    return {'kind': type(self).__name__.lower(), **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Byte(Tokenizer):
  """The bytes of the text's UTF-8."""

  vocab_size = 256

  def encode(self, text):
    # surrogateescape: a command line that is no UTF-8 keeps its bytes.
    return np.frombuffer(text.encode('utf-8', 'surrogateescape'), np.uint8)

  def lost(self, text):
    return 0

  def _decode(self, ids):
    return bytes(ids).decode('utf-8', 'replace')


@dataclasses.dataclass(frozen=True)
class Char(Tokenizer):
  """One token a character: token i is character i of `chars`."""

  chars: str

  @property
  def vocab_size(self):
    return len(self.chars)

  def encode(self, text):
    known, points = _code_points(self.chars), _code_points(text)
    ids = np.argsort(known).astype(self.dtype)
    known = known[ids]
    place = np.minimum(np.searchsorted(known, points), len(known) - 1)
    wrong = points[known[place] != points]
    if wrong.size:
      raise ValueError(
          f'--tokenizer=char has no {chr(wrong[0])!r} (U+{wrong[0]:04X}): use '
          f'the {len(ids)} characters of the training text alone, or train '
          'with --tokenizer=byte')
    return ids[place]

  def kept(self, text):
    points = _code_points(text)
    known = points[np.isin(points, _code_points(self.chars))]
    return known.tobytes().decode('utf-32-le', 'surrogatepass')

  def lost(self, text):
    return len(text) - len(self.kept(text))

  def _decode(self, ids):
    return ''.join(self.chars[token] for token in ids)


@dataclasses.dataclass(frozen=True)
class Bpe(Tokenizer):
  """A tokenizer of the tokenizers library; `text` is its tokenizer.json."""

  text: str

  @functools.cached_property
  def _inner(self):
    inner = _library().Tokenizer.from_str(self.text)
    # Those of the rows of a model: a corpus is neither cut nor filled up.
    inner.no_truncation()
    inner.no_padding()
    return inner

  @functools.cached_property
  def vocab_size(self):
    return 1 + max(self._inner.get_vocab().values())

  def encode(self, text):
    chunks = _chunks(text) if BYTELEVEL in self.text else [text]
    ids = [np.empty(0, self.dtype)]
    for i in range(0, len(chunks), 256):  # bounds the library's memory
      ids += [np.array(encoding.ids, self.dtype)
              for encoding in self._inner.encode_batch(
                  chunks[i:i + 256], add_special_tokens=False)]
    return np.concatenate(ids)

  def lost(self, text):
    exact = BYTELEVEL in self.text and self._inner.normalizer is None
    return 0 if exact else super().lost(text)

  def _decode(self, ids):
    return self._inner.decode(ids, skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class Ids(Tokenizer):
  """Ids whose text is unknown: written as numbers with spaces between."""

  vocab_size: int

  def encode(self, text):
    for word in text.split():
      if not (word.isdecimal() and int(word) < self.vocab_size):
        raise ValueError(
            f'{word!r} is no token id: the data set has no text, so give ids '
            f'from 0 to {self.vocab_size - 1}, with spaces between')
    return np.array([int(word) for word in text.split()], self.dtype)

  def decode(self, ids):
    return ' '.join(str(int(token)) for token in ids)


def make(spec, documents):
  """Makes the tokenizer that `--tokenizer` asks for.

  'char' and 'bpe:N' learn from the documents, a list of strings. Raises
  ValueError for an unknown spec, a bad N or a file that is no tokenizer, and
  ImportError without the tokenizers library where it is needed.
  """
  if spec == 'byte':
    return Byte()
  if spec == 'char':
    return Char(''.join(sorted(set().union(*documents))))
  if re.fullmatch(r'bpe:\d+', spec):
    return _train_bpe(int(spec[4:]), documents)
  if pathlib.Path(spec).suffix == '.json' or pathlib.Path(spec).is_file():
    library = _library()
    try:
      return Bpe(library.Tokenizer.from_file(spec).to_str())
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(
          f'--tokenizer={spec} is no tokenizer ({error}): give the path of a '
          f'tokenizer.json, or {", ".join(SPECS)}') from None
  near = difflib.get_close_matches(spec, SPECS, n=1, cutoff=0.4)
  raise ValueError(
      f'--tokenizer={spec} is unknown: use {", ".join(SPECS)} or the path of a '
      'tokenizer.json' + ''.join(f'; did you mean {name}?' for name in near))


def from_json(saved):
  """The tokenizer whose `to_json` gave `saved`."""
  kind = {'byte': Byte, 'char': Char, 'bpe': Bpe, 'ids': Ids}[saved['kind']]
  return kind(**{key: saved[key] for key in saved if key != 'kind'})


def read_meta(path):
  """The dict of a nanoGPT meta.pkl; ValueError for any other pickle."""
  try:
    with open(path, 'rb') as file:
      return dict(_PlainUnpickler(file).load())
  except Exception as error:  # a broken pickle raises nearly anything
    raise _no_meta(path, error) from None


def from_meta(path):
  """The tokenizer of a nanoGPT meta.pkl: Char, or Ids if it has no stoi.

  Raises ValueError for any other pickle.
  """
  meta = read_meta(path)
  try:
    if 'stoi' not in meta:
      return Ids(int(meta['vocab_size']))
    chars = [meta['itos'][i] for i in range(meta['vocab_size'])]
    pairs = {char: i for i, char in enumerate(chars)}
    if meta['stoi'] != pairs or {len(char) for char in chars} != {1}:
      raise ValueError('stoi and itos do not pair single characters with ids')
    return Char(''.join(chars))
  except (TypeError, ValueError, LookupError) as error:
    raise _no_meta(path, error) from None


def _no_meta(path, error):
  return ValueError(
      f'--dataset: {path} is no plain meta.pkl ({type(error).__name__}: '
      f'{error}): remove it to train on the ids')


def stream(tokenizer, ids, *, after=()):
  """Yields text as ids (an iterable) arrive, characters always whole.

  Joined, what it yields is the text of all the ids, as it reads after the
  text of those that came before them.
  """
  context, pending = [*after], []
  for _ in range(3):  # Bytes of a character that lacks its last one.
    if tokenizer.decode(context).endswith(UNKNOWN):
      pending.insert(0, context.pop())
  for token in ids:
    pending.append(int(token))
    text = tokenizer.decode(context + pending)
    if not text.endswith(UNKNOWN):
      yield text[len(tokenizer.decode(context)):]
      context, pending = pending, []
  if pending:
    text = tokenizer.decode(context + pending)
    yield text[len(tokenizer.decode(context)):]


class _PlainUnpickler(pickle.Unpickler):
  """Refuses every name: a pickle can call any function that it names."""

  def find_class(self, module, name):
    raise pickle.UnpicklingError(f'it names {module}.{name}')


def _code_points(text):
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


def _chunks(text):
  """Cuts text where byte-level BPE does: after a newline between two words."""
  chunks, start, cut = [], 0, re.compile(r'(?<=\S\n)(?=\S)')
  while start < len(text):
    found = cut.search(text, start + CHUNK)
    end = found.start() if found else len(text)
    chunks.append(text[start:end])
    start = end
  return chunks


def _library():
  try:
    import tokenizers  # slow to import, and most runs do not need it
  except ImportError:
    raise ImportError(
        '--tokenizer=bpe:N and tokenizer.json need the tokenizers library: '
        'pip install -e ".[data]", or use --tokenizer=byte') from None
  return tokenizers


def _train_bpe(vocab_size, documents):
  if vocab_size < 256:
    raise ValueError(
        f'--tokenizer=bpe:{vocab_size} has no room for the 256 bytes: use '
        'bpe:4096, or any number from 256')
  library = _library()
  bytes_first = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner = library.Tokenizer(library.models.BPE())
  inner.pre_tokenizer, inner.decoder = bytes_first, library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
      vocab_size=vocab_size, show_progress=False,
      initial_alphabet=bytes_first.alphabet())
  inner.train_from_iterator(
      (chunk for document in documents for chunk in _chunks(document)), trainer)
  return Bpe(inner.to_str())
