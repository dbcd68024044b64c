"""Checkpoints through Orbax: the latest two, the best one, all verified.

Orbax notices neither a flipped bit nor a missing array, and does not sync the
JSON that it writes. So every checkpoint carries a fingerprint of its arrays
and a hash of its JSON, is synced before it gets its name, and a restore that
does not reproduce both walks back to the newest one that does.
"""

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import warnings

import jax

from train_lib import disk, fingerprint

KEPT_LATEST, KEPT_BEST = 2, 1

# What Orbax appends to the name of a folder that it is still writing.
UNFINISHED = '.orbax-checkpoint-tmp'


def flatten(state):
  """What is stored of a TrainState: {'params': ..., 'rest': ...} of arrays."""
  rest = dataclasses.replace(state, params=None)
  leaves = jax.tree_util.tree_flatten_with_path(rest)[0]
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='.')
  return {'params': state.params,
          'rest': {name(path): leaf for path, leaf in leaves}}


def unflatten(template, items):
  """The TrainState of `flatten`'s items, in the template's structure."""
  rest = dataclasses.replace(template, params=None)
  leaves = [items['rest'][name] for name in flatten(template)['rest']]
  rest = jax.tree.unflatten(jax.tree.structure(rest), leaves)
  return dataclasses.replace(rest, params=items['params'])


class Damaged(Exception):
  """A checkpoint was read and is not what was saved; the message says why."""


class Checkpoints:
  """The checkpoints of a workdir, which one process at a time may write to.

  Args:
    workdir: the run's folder.
    read_only: leave everything on disk as it is.
  """

  def __init__(self, workdir, *, read_only=False):
    import orbax.checkpoint as ocp
    self._args = ocp.args
    talk = logging.getLogger('absl')  # Of Orbax, also in a notebook.
    talk.setLevel(max(talk.getEffectiveLevel(), logging.ERROR))
    # Orbax fails on a relative path, later and in a thread.
    self.workdir = pathlib.Path(os.path.abspath(workdir))
    self.folder = self.workdir / 'checkpoints'
    self._orbax = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(), async_options=ocp.AsyncOptions(
            # Made in a thread, they have others wait for minutes if they fail.
            create_directories_asynchronously=False,
            post_finalization_callback=self._sync_unfinished))
    self._chief = jax.process_index() == 0 and not read_only
    if self._chief:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._remove_unfinished()  # Of a kill.
    self._metas, self._reasons, self._saving = {}, {}, None
    for step in self._numbered():
      try:
        with self._readable(step):
          self._metas[step] = self._read_meta(step)
      except Damaged as reason:
        self._reasons[step] = str(reason)

  def steps(self):
    """Steps with a checkpoint whose JSON is whole, oldest first."""
    return sorted(self._metas)

  def meta(self, step):
    """The JSON that was saved with a step."""
    return self._metas[step]

  def best(self):
    """The step of the lowest validation loss, or None."""
    losses = {step: meta['val_loss'] for step, meta in self._metas.items()
              if meta['val_loss'] is not None}
    return min(losses, key=losses.get, default=None)

  def save(self, step, state, *, meta, val_loss=None):
    """Starts to write a checkpoint.

    Args:
      step: python int.
      state: the TrainState; it may be donated as soon as this returns.
      meta: JSON: config, tokenizer and what else a reader needs.
      val_loss: of this very state, what the best checkpoint is chosen by;
        None if it was not evaluated. One that is not finite counts as None.

    Raises:
      OSError: this one, or the one before, could not be written.
    """
    self.wait()  # Till now the older ones might have been needed.
    if step in self._metas:
      return
    if self._chief:  # Whatever lies there is no checkpoint of this run.
      self._set_aside(step, 'damaged')
    items = flatten(state)
    ranked = val_loss is not None and math.isfinite(val_loss)
    meta = {**meta, 'step': step, 'val_loss': val_loss if ranked else None,
            'shapes': {
                item: fingerprint.shapes(x) for item, x in items.items()},
            'fingerprint': {
                item: fingerprint.marks(x) for item, x in items.items()}}
    self._saving = step, meta
    with self._written():
      self._orbax.save(
          self.folder / str(step), args=self._args.Composite(
              meta=self._args.JsonSave({'sha256': _sha256(meta), 'meta': meta}),
              **{item: self._args.StandardSave(x)
                 for item, x in items.items()}))

  def restore(self, items, *, best=False, check=None):
    """The newest good checkpoint.

    Args:
      items: {'params': ..., 'rest': ...} as of `flatten`, or one of them, of
        jax.ShapeDtypeStruct with shardings.
      best: take the one with the lowest validation loss first.
      check: called with the JSON of a checkpoint before its arrays are read;
        raises ValueError for one that is not of this run.

    Returns:
      (step, the items restored, meta), or None where there is no checkpoint.
      A damaged checkpoint is passed over, and a line on stderr says so. Once
      an older one is restored it is moved to `damaged/`, so that its step can
      be saved again; until then nothing is moved.

    Raises:
      ValueError: there are checkpoints, and none is good; or they are not of
        arrays like these.
      OSError: the system cannot read them, good or not.
    """
    first, damaged = self.best() if best else None, {}
    for step in sorted(self._numbered(),
                       key=lambda step: (step == first, step), reverse=True):
      try:
        found = self._verified(step, items, check)
      except Damaged as reason:
        damaged[step] = reason
        continue
      for other, why in damaged.items():
        if jax.process_index() == 0:
          print(f'checkpoint {other} is damaged ({why}): going on from '
                f'{step}', file=sys.stderr, flush=True)
        if self._chief:
          self._set_aside(other, 'damaged')
        self._metas.pop(other, None)
      return step, found, self._metas[step]
    if damaged:
      raise ValueError(
          f'none of the checkpoints in {self.folder} can be restored ('
          + '; '.join(f'{step}: {why}' for step, why in damaged.items())
          + '): nothing was moved; start anew in another --workdir')
    aside = self.workdir / 'damaged'
    if aside.is_dir() and any(aside.iterdir()):
      raise ValueError(
          f'{self.folder} is empty, but {aside} has checkpoints: move one back '
          'that is good, or start anew in another --workdir')
    return None

  def withdraw(self, step):
    """Moves the checkpoints from `step` on to `diverged/`.

    Returns:
      The newest step that is left, or None.
    """
    self._settle()
    broken = [s for s in self._metas if s >= step]
    if broken and self._chief:  # One is enough to look at.
      shutil.rmtree(self.workdir / 'diverged', ignore_errors=True)
    for s in broken:
      if self._chief:
        self._set_aside(s, 'diverged')
      del self._metas[s]
    return max(self._metas, default=None)

  def check(self):
    """Raises OSError if the save that was started has failed; never waits."""
    if self._saving is not None:
      with self._written():
        self._orbax.check_for_errors()

  def wait(self):
    """Returns when everything is on disk, and older ones are deleted.

    Raises:
      OSError: writing failed.
    """
    self._settle()
    kept = {*self.steps()[-KEPT_LATEST:], self.best()}
    for old in self._metas.keys() - kept:
      del self._metas[old]
      if self._chief:
        self._delete(old)

  def _settle(self):
    """Returns when the save that was started is on disk."""
    if self._saving is None:
      return
    with self._written():
      self._orbax.wait_until_finished()
      if self._chief:
        disk.sync(self.folder)
    step, meta = self._saving
    self._saving, self._metas[step] = None, meta

  def _numbered(self):
    """The steps that folders are named after."""
    if not self.folder.is_dir():
      return []
    names = [path.name for path in self.folder.iterdir()]
    return [int(name) for name in names
            if name.isdecimal() and str(int(name)) == name]

  def _read_meta(self, step):
    try:
      saved = json.loads((self.folder / str(step) / 'meta/metadata')
                         .read_bytes())
      meta = saved['meta']
      whole = saved['sha256'] == _sha256(meta)
    except disk.ABSENT as error:
      raise Damaged(f'no {error.filename}') from None
    except (ValueError, KeyError, TypeError, RecursionError):
      raise Damaged('its meta/metadata is not what was written') from None
    if not whole:
      raise Damaged('its meta/metadata has changed')
    if meta['step'] != step:
      raise Damaged(f'it is of step {meta["step"]}')
    return meta

  def _verified(self, step, items, check):
    if step not in self._metas:
      raise Damaged(self._reasons.get(step, 'it is not whole'))
    meta, folder = self._metas[step], self.folder / str(step)
    if check:
      check(meta)
    for item, wanted in items.items():
      _same_shapes(meta['shapes'][item], fingerprint.shapes(wanted), folder)
    with self._readable(step):
      found = self._read_arrays(step, items)
    for item in items:
      own = fingerprint.marks(found[item])
      for name, mark in meta['fingerprint'][item].items():
        if own.get(name) != mark:
          raise Damaged(f'the fingerprint of {name} does not match')
    return {item: found[item] for item in items}

  def _read_arrays(self, step, items):
    folder = self.folder / str(step)
    args = self._args.Composite(**{
        n: self._args.StandardRestore(wanted) for n, wanted in items.items()})
    with _no_traces():
      try:
        return self._orbax.restore(folder, args=args)
      except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # Of this machine, not of what it read.
      except Exception as error:  # Whatever Orbax makes of a damaged file.
        reason, cause = _first_line(error), disk.system_error(error)
      gc.collect()
    if cause is not None and not isinstance(cause, disk.ABSENT):
      raise cause
    disk.read_all(folder)
    raise Damaged(reason)

  @contextlib.contextmanager
  def _readable(self, step):
    """What the system says when it cannot read, with what it was about."""
    try:
      yield
    except OSError as error:
      raise OSError(
          f'checkpoint {step} in {self.folder} cannot be read ({error}): '
          'nothing was moved; start again when it can') from error

  @contextlib.contextmanager
  def _written(self):
    """Whatever a failed save makes Orbax raise becomes one OSError."""
    try:
      yield
    except Exception as error:
      step, self._saving = self._saving[0], None
      if self._chief:  # The disk may be full of it.
        self._remove_unfinished()
      reason = disk.system_error(error) or _first_line(error)
      last = f'the last good one is {max(self._metas)}' if self._metas else (
          'there is none before')
      raise OSError(f'checkpoint {step} cannot be written in {self.folder} '
                    f'({reason}); {last}') from error

  def _delete(self, step):
    folder = self.folder / str(step)
    doomed = folder.with_name(f'{step}{UNFINISHED}')
    with contextlib.suppress(FileNotFoundError):  # Somebody was faster.
      folder.rename(doomed)  # A kill leaves no half of a checkpoint.
      shutil.rmtree(doomed, ignore_errors=True)

  def _remove_unfinished(self):
    for path in self.folder.glob(f'*{UNFINISHED}'):
      shutil.rmtree(path, ignore_errors=True)

  def _sync_unfinished(self):
    """Called by Orbax when all is written, before the folder gets its name."""
    for path in self.folder.glob(f'*{UNFINISHED}'):
      disk.sync_tree(path)

  def _set_aside(self, step, where):
    folder, aside = self.folder / str(step), self.workdir / where
    if os.path.lexists(folder):
      aside.mkdir(exist_ok=True)
      names = (aside / f'{step}-{n}' for n in itertools.count())
      folder.rename(next(n for n in names if not n.exists()))

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._settle()
    self._orbax.close()


def _sha256(meta):
  return hashlib.sha256(
      json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _same_shapes(saved, wanted, folder):
  """ValueError if {name: 'float32[2, 3]'} are not those of a checkpoint."""
  for name in sorted(saved.keys() | wanted.keys()):
    before, now = saved.get(name, 'missing'), wanted.get(name, 'missing')
    if before != now:
      raise ValueError(f'{name} is {now}, but in {folder} it is {before}: use '
                       'another --workdir, or the flags of the run')


def _first_line(error):
  return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _no_traces():
  """Reads that Orbax gives up print a page each when they are collected."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    with warnings.catch_warnings(action='ignore', category=RuntimeWarning):
      yield
  finally:
    sys.unraisablehook = hook
