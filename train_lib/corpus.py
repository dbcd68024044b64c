"""Text to tokens: what `--dataset` names, read, split and encoded."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import pathlib
import tempfile
import urllib.request
import zipfile

import numpy as np

import train_lib.tokenizer as tokenizer_lib
from train_lib import bins, data, manual

NAMES = ('pydoc', 'shakespeare_char', 'hf:OWNER/NAME')
SHAKESPEARE_URL = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
                   'data/tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = (
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Tokens of the two splits; arrays are 1-D, unsigned, perhaps on disk.

  `train_starts` and `val_starts` are the documents' offsets with packing, else
  None. `val_bytes` is the UTF-8 length of the validation text, None if
  unknown, and `lost` how many of its characters the tokenizer does not give
  back. `sha256` is that of the raw text or of train.bin and val.bin. `notes`
  are lines that who uses the data should read.
  """

  name: str
  tokenizer: tokenizer_lib.Tokenizer
  train: np.ndarray
  val: np.ndarray
  train_starts: np.ndarray | None
  val_starts: np.ndarray | None
  val_bytes: int | None
  sha256: str
  lost: int = 0
  notes: tuple = ()

  train_batch, eval_batch = data.train_batch, data.eval_batch
  full_batch, full_batches = data.full_batch, data.full_batches

  @property
  def vocab_size(self):
    return self.tokenizer.vocab_size


def load(name, *, tokenizer='byte', packing=False, val_fraction=0.1,
         bin_dtype=None, cache_dir=None):
  """Loads a data set and splits it by position in the text.

  Validation is the last `val_fraction` of the characters, with packing from
  the nearest start of a document: the same text whatever the tokenizer.
  nanoGPT folders, and Hugging Face data sets that have one, keep their own.

  Args:
    name: 'pydoc', the manual of Python; 'shakespeare_char';
      'hf:OWNER/NAME[/CONFIG]', column 'text'; a text file; a folder of text
      files, each a document; or a nanoGPT folder of train.bin and val.bin,
      whose tokenizer is its meta.pkl or bare ids.
    tokenizer: what `--tokenizer` takes, or a tokenizer, without whose tokens
      characters are left out and counted.
    packing: documents do not see each other: batches have segment ids.
    bin_dtype: of train.bin and val.bin; none: as meta.pkl says, or uint16.
    cache_dir: for downloads and BPE encodings, attention-lab under
      $XDG_CACHE_HOME or ~/.cache unless given.

  Raises ValueError for what cannot be read, split or encoded, and ImportError
  without a library of the extra 'data'.
  """
  if not 0 <= val_fraction < 1:
    raise ValueError(f'--val_fraction={val_fraction} must be 0 to 0.99')
  cache = pathlib.Path(cache_dir or _home() / 'attention-lab')
  if name not in NAMES and (pathlib.Path(name) / 'train.bin').is_file():
    return _load_bins(
        name, tokenizer=tokenizer, packing=packing, dtype=bin_dtype)
  if bin_dtype:
    raise ValueError(f'--bin_dtype={bin_dtype} has no effect: --dataset={name} '
                     'is no folder with a train.bin')
  documents, val, notes = _read(name, cache)
  sha256 = hashlib.sha256()
  for document in [*documents, *(val or ())]:
    sha256.update(document.encode())
  if val is None:
    documents, val = _split(
        name, documents, packing=packing, val_fraction=val_fraction)
  if isinstance(tokenizer, str):  # validation trains no BPE, but has characters
    tokenizer = tokenizer_lib.make(
        tokenizer, documents + val if tokenizer == 'char' else documents)
  splits = {}
  for key, texts in ('train', documents), ('val', val):
    splits[key], starts = _encode(texts, tokenizer, cache=cache)
    splits[f'{key}_starts'] = starts if packing else None
  lost = sum(map(tokenizer.lost, val))
  if lost:
    notes = [*notes, f'the tokenizer loses {lost:,} of the '
             f'{sum(map(len, val)):,} characters of the validation text: they '
             'cost no bits']
  return Dataset(
      name=name, tokenizer=tokenizer, **splits, sha256=sha256.hexdigest(),
      val_bytes=sum(len(document.encode()) for document in val), lost=lost,
      notes=tuple(notes))


def _home():
  """The folder of caches; where there is no home, that of temporary files."""
  try:
    return pathlib.Path(
        os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  except RuntimeError:
    return pathlib.Path(tempfile.gettempdir())


def _read(name, cache):
  """(documents, those of a validation split or None, notes)."""
  if name == 'pydoc':
    documents, notes = manual.read()
    return documents, None, notes
  if name == 'shakespeare_char':
    return [_shakespeare(cache / 'tinyshakespeare.txt').decode()], None, []
  if name.startswith('hf:'):
    return *_hugging_face(name), []
  if pathlib.Path(name).is_dir():
    documents, notes = _read_folder(name)
    return documents, None, notes
  if not pathlib.Path(name).is_file():
    near = difflib.get_close_matches(name, NAMES, n=1)
    raise ValueError(
        f'--dataset={name} is no file or folder: give one, or '
        + ', '.join(NAMES) + ''.join(f'; did you mean {it}?' for it in near))
  text = _text(pathlib.Path(name))
  if not text:
    problem = 'empty' if text == '' else 'no UTF-8 text'
    raise ValueError(f'--dataset={name} is {problem}: give a text file')
  return [text], None, []


def _text(path):
  """The text of a file, None if it is no text."""
  try:
    text = path.read_bytes().decode()
  except UnicodeDecodeError:
    return None
  return None if '\0' in text else text


def _lines(documents):
  return [document if document.endswith('\n') else document + '\n'
          for document in documents]


def _read_folder(name):
  """(documents, notes) of the files that are text."""
  folder = pathlib.Path(name)
  files = [path.relative_to(folder).as_posix() for path in folder.rglob('*')
           if path.is_file()]
  files = sorted(file for file in files if '/.' not in '/' + file)  # no .git
  texts = {file: _text(folder / file) for file in files}
  skipped = [file for file in files if not texts[file]]
  if len(skipped) == len(files):
    raise ValueError(f'--dataset={name} has no text among its {len(files)} '
                     'files: give a folder of UTF-8 text files')
  notes = []
  if skipped:
    some = ', '.join(skipped[:3]) + ', ...' * (len(skipped) > 3)
    notes.append(f'{len(skipped)} of {len(files)} files are left out, empty or '
                 f'no text: {some}')
  return _lines(filter(None, texts.values())), notes


def _shakespeare(path):
  right = lambda raw: hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256
  problem = 'what came has another SHA-256'
  try:
    if path.is_file() and right(raw := path.read_bytes()):
      return raw
    with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as reply:
      if right(raw := reply.read()):
        _write(path, lambda file: file.write(raw))
        return raw
  except OSError as error:
    problem = str(error)
  raise ValueError(f'--dataset=shakespeare_char, from {SHAKESPEARE_URL}: '
                   f'{problem}; put that file at {path}')


def _hugging_face(name):
  try:
    import datasets  # a second, which few runs need to spend
  except ImportError:
    raise ImportError(f'--dataset={name} needs the datasets library: '
                      'pip install -e ".[data]"') from None
  parts = name.removeprefix('hf:').split('/')
  try:
    splits = datasets.load_dataset('/'.join(parts[:2]), *parts[2:])
    val = splits['validation']['text'] if 'validation' in splits else None
    return _lines(splits['train']['text']), val and _lines(val)
  except Exception as error:  # offline, unknown, no such column: all differ
    reason = f'{type(error).__name__}: ' + ' '.join(str(error).split())
    raise ValueError(f'--dataset={name} cannot be loaded ({reason}): it needs '
                     "the network, a split 'train', a column 'text'") from None


def _split(name, documents, *, packing, val_fraction):
  if not val_fraction:
    return documents, []
  if not packing:
    text = ''.join(documents)
    cut = int((1 - val_fraction) * len(text))
    return [text[:cut]], [text[cut:]]
  if len(documents) < 2:
    raise ValueError(
        f'--packing needs two documents or more, but --dataset={name} is one: '
        'give a folder of files, or --nopacking')
  ends = np.cumsum([len(document) for document in documents])
  cut = 1 + np.argmin(np.abs(ends[:-1] - (1 - val_fraction) * ends[-1]))
  return documents[:cut], documents[cut:]


def _encode(documents, tokenizer, *, cache):
  """Tokens of all documents and where each starts, from the cache for BPE."""
  path = None
  if isinstance(tokenizer, tokenizer_lib.Bpe):
    key = hashlib.sha256(json.dumps(tokenizer.to_json()).encode())
    for document in documents:
      key.update(hashlib.sha256(document.encode()).digest())
    path = cache / f'{key.hexdigest()}.npz'
    try:
      with np.load(path) as saved:
        return saved['tokens'], saved['starts']
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      logging.info('encoding %d documents', len(documents))
  parts = [tokenizer.encode(tokenizer.kept(document))
           for document in documents]
  starts = np.cumsum([0, *map(len, parts)])[:-1]
  tokens = np.concatenate([np.empty(0, tokenizer.dtype), *parts])
  if path:
    with contextlib.suppress(OSError):  # a full disk is no reason to stop
      _write(path, lambda file: np.savez(file, tokens=tokens, starts=starts))
  return tokens, starts


def _write(path, write):
  """Writes a file that is either whole or not there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    with open(pathlib.Path(folder) / path.name, 'wb') as file:
      write(file)
    os.replace(file.name, path)


def _load_bins(name, *, tokenizer, packing, dtype):
  """A nanoGPT folder."""
  if packing:
    raise ValueError(f'--packing needs documents, which train.bin in --dataset='
                     f'{name} does not mark: give text files, or --nopacking')
  path = pathlib.Path(name) / 'meta.pkl'
  meta = tokenizer_lib.read_meta(path) if path.is_file() else {}
  dtype = dtype or meta.get('dtype', 'uint16')
  if dtype not in bins.DTYPES:
    raise ValueError(f'--dataset={name}: {path} says dtype {dtype!r}, which '
                     f'must be {" or ".join(bins.DTYPES)}')
  splits, tops, sha256 = bins.read(name, dtype=dtype)
  if isinstance(tokenizer, tokenizer_lib.Byte | tokenizer_lib.Char) and (
      'stoi' not in meta or tokenizer_lib.from_meta(path) != tokenizer):
    raise ValueError(
        f'--dataset={name} holds ids, and no meta.pkl that says they are those '
        'of the tokenizer of the run: give text')
  if tokenizer in ('byte', 'char') and meta:
    tokenizer = tokenizer_lib.from_meta(path)
  elif tokenizer == 'byte':
    tokenizer = tokenizer_lib.Ids(1 + max(tops.values()))
  elif tokenizer == 'char' or str(tokenizer).startswith('bpe:'):
    raise ValueError(
        f'--tokenizer={tokenizer} needs text, but --dataset={name} holds ids: '
        'leave it out, or give the tokenizer.json that made them')
  elif isinstance(tokenizer, str):
    tokenizer = tokenizer_lib.make(tokenizer, [])
  vocab_size = tokenizer.vocab_size
  if vocab_size > 1 + np.iinfo(dtype).max:
    raise ValueError(
        f'--dataset={name}: a vocabulary of {vocab_size} cannot be in {dtype} '
        'files: give the meta.pkl or --tokenizer that made them, or '
        '--bin_dtype')
  for path, top in tops.items():
    if top >= vocab_size:
      raise ValueError(
          f'--dataset={name}: {path} has token id {top}, beyond the vocabulary '
          f'of {vocab_size}: give the meta.pkl or --tokenizer that made it')
  val_bytes = None
  if isinstance(tokenizer, tokenizer_lib.Char):
    lengths = [len(char.encode()) for char in tokenizer.chars]
    val_bytes = int(np.bincount(splits['val'], minlength=vocab_size) @ lengths)
  return Dataset(
      name=name, tokenizer=tokenizer, **splits, train_starts=None,
      val_starts=None, val_bytes=val_bytes, sha256=sha256)
