"""Checkpoints through Orbax: the latest two, the best one, all verified.

Orbax notices neither a flipped bit nor a missing array. So every checkpoint
carries a fingerprint of its arrays, and a restore that does not reproduce it
walks back to the newest one that does.
"""

import dataclasses
import json
import logging
import os
import pathlib

import jax
import jax.numpy as jnp

KEPT_LATEST, KEPT_BEST = 2, 1


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


@jax.jit
def fingerprint(arrays):
  """{name: uint32} that any change of a single element changes.

  The sum, modulo 2^32, of a hash of every element's bits and place. Integers,
  so that neither the order of summation nor the mesh matters; for each place
  the hash (the finaliser of MurmurHash3) is one to one in the bits.
  """
  def of(x):
    h = jax.lax.bitcast_convert_type(
        x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    h = h ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
  return {name: of(x) for name, x in arrays.items()}


def marks(arrays):
  """The fingerprint of {name: array} as JSON."""
  return {name: int(mark) for name, mark in fingerprint(arrays).items()}


class Checkpoints:
  """The checkpoints of a workdir.

  Args:
    workdir: the run's folder.
    read_only: leave everything on disk as it is.
  """

  def __init__(self, workdir, *, read_only=False):
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies
    self._ocp, self._read_only = ocp, read_only
    talk = logging.getLogger('absl')  # Of Orbax, also in a notebook.
    talk.setLevel(max(talk.level, logging.ERROR))
    # Orbax fails on a relative path, later and in a thread.
    self.folder = pathlib.Path(os.path.abspath(workdir)) / 'checkpoints'
    by_loss = lambda metrics: -metrics['val_loss']
    self.manager = ocp.CheckpointManager(
        self.folder, options=ocp.CheckpointManagerOptions(
            create=not read_only, read_only=read_only, best_fn=by_loss,
            preservation_policy=policies.AnyPreservationPolicy([
                policies.LatestN(KEPT_LATEST),
                policies.BestN(get_metric_fn=by_loss, n=KEPT_BEST)])))

  def steps(self):
    """Steps with a checkpoint, oldest first."""
    return sorted(self.manager.all_steps())

  def save(self, step, state, *, meta, val_loss):
    """Starts to write a checkpoint; a step that has one is left alone.

    Args:
      step: python int.
      state: the TrainState; it may be donated as soon as this returns.
      meta: JSON: config, tokenizer and what else a reader needs.
      val_loss: what the best checkpoint is chosen by.
    """
    if step in self.manager.all_steps():
      return
    args, items = self._ocp.args, flatten(state)
    found = {item: marks(arrays) for item, arrays in items.items()}
    self.manager.save(
        step, metrics={'val_loss': val_loss}, args=args.Composite(
            meta=args.JsonSave({**meta, 'fingerprint': found}),
            **{n: args.StandardSave(arrays) for n, arrays in items.items()}))

  def meta(self, step):
    """The JSON that was saved with a step."""
    args = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
    return self.manager.restore(step, args=args)['meta']

  def restore(self, items, *, best=False):
    """The newest good checkpoint.

    Args:
      items: {'params': ..., 'rest': ...} as of `flatten`, or one of them, of
        jax.ShapeDtypeStruct with shardings.
      best: take the one with the lowest validation loss first.

    Returns:
      (step, the items restored, meta), or None where there is no checkpoint.
      A damaged checkpoint is passed over, and the log says so; it is moved
      to `damaged/`, so that its step can be saved again.

    Raises:
      ValueError: there are checkpoints, and none is good.
    """
    first = self.manager.best_step() if best else None
    steps = sorted(self.steps(), key=lambda step: (step == first, step))[::-1]
    for step in steps:
      try:
        return step, *self._verified(step, items)
      except Exception as error:  # Whatever Orbax makes of a damaged file.
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        logging.error('checkpoint %d is damaged (%s); trying an older one',
                      step, reason)
        self._set_aside(step)
    if steps:
      raise ValueError(
          f'none of the checkpoints in {self.folder} can be restored: start '
          'anew in another --workdir')
    return None

  def _verified(self, step, items):
    args = self._ocp.args
    found = self.manager.restore(step, args=args.Composite(
        meta=args.JsonRestore(),
        **{n: args.StandardRestore(wanted) for n, wanted in items.items()}))
    meta = found['meta']
    for item in items:
      own = marks(found[item])
      for name, mark in meta['fingerprint'][item].items():
        if own.get(name) != mark:
          raise ValueError(f'the fingerprint of {name} does not match')
    return {item: found[item] for item in items}, meta

  def _set_aside(self, step):
    if self._read_only:
      return
    folder = self.folder / str(step)
    if jax.process_index() == 0 and folder.exists():
      aside = self.folder.parent / 'damaged'
      aside.mkdir(exist_ok=True)
      n = len(list(aside.iterdir()))
      folder.rename(aside / f'{step}-{n}')
    self.manager.reload()

  def wait(self):
    """Returns when everything is on disk; raises if writing failed."""
    self.manager.wait_until_finished()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.wait()
    self.manager.close()


def write_json(path, value):
  """Writes JSON whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n')
  temporary.replace(path)
