"""Everything that a config stands for, checked before anything is computed."""

import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp

import attention
from attention.kernels import dispatch
from configs import default
from train_lib import checkpoints, data, evaluate, optim, sharding
from train_lib.state import Skeleton, TrainState

# Where a run is and what is done with it: not part of what it computes.
PLACE = ('workdir', 'mode')


@dataclasses.dataclass(frozen=True)
class Session:
  """A dataset, a mesh, a model without arrays, an optimiser.

  Attributes:
    config: resolved: vocab_size and mesh as they are used.
    workdir: the run's folder.
    dataset: a data.Dataset.
    mesh: the jax Mesh.
    skeleton: the model's structure.
    optimizer: the optax transformation.
    template: abstract TrainState with shardings.
  """
  config: object
  workdir: pathlib.Path
  dataset: data.Dataset
  mesh: jax.sharding.Mesh
  skeleton: Skeleton
  optimizer: object
  template: TrainState

  def init_state(self):
    """A fresh TrainState, made where it will lie."""
    shardings = jax.tree.map(lambda x: x.sharding, self.template)
    return jax.jit(self._init, out_shardings=shardings)(
        jax.random.key(self.config.seed))

  def _init(self, key):
    return _init(self.skeleton, self.optimizer, key)

  def batch(self, step):
    """The global training batch of a step."""
    config = self.config
    return sharding.global_batch(
        lambda rows: data.train_batch(
            self.dataset, step=step, rows=rows, batch_size=config.batch_size,
            block_size=config.block_size, seed=config.seed),
        config.batch_size, self.mesh)

  @functools.cached_property
  def evaluator(self):
    """The jitted function of train_lib.evaluate, compiled once a run."""
    return evaluate.make_evaluator(self)

  def flops_per_token(self):
    """Of a training step: the forward pass, and twice as much backward."""
    return 3 * self.skeleton.model.flops(self.config.block_size)

  def meta(self):
    """What a checkpoint says of its run, as JSON."""
    return {'config': saved_config(self.config),
            'tokenizer': self.dataset.tokenizer.to_json(),
            'dataset_sha256': self.dataset.sha256}


def _init(skeleton, optimizer, key):
  params = skeleton.init(key)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero)


def saved_config(config):
  """The config as JSON, without the place of the run."""
  return {k: v for k, v in config.to_dict().items() if k not in PLACE}


def check(config):
  """Raises ValueError for flags that make no sense, or not on this machine."""
  default.check(config)
  dispatch.check(config.attention_kernel)
  if config.profile_steps is not None:
    steps = config.profile_steps
    if len(steps) != 2 or not all(str(s).isdigit() for s in steps):
      raise ValueError(f'profile_steps {steps} must be two steps: FIRST LAST')


def open_session(config, workdir=None):
  """Loads the data, builds the mesh and the model's structure.

  Args:
    config: a config of configs.default.get_config, left unchanged.
    workdir: folder of the run; none: a new one under runs/.

  Raises:
    ValueError: one line on what does not fit.
  """
  config = config.copy_and_resolve_references()
  check(config)
  mesh = sharding.make_mesh(config)
  workdir = make_workdir(workdir or config.workdir, config)
  dataset = data.load(
      config.dataset, tokenizer=config.tokenizer, packing=config.packing,
      val_fraction=config.val_fraction)
  config.vocab_size = config.vocab_size or dataset.vocab_size
  if config.vocab_size < dataset.vocab_size:
    raise ValueError(
        f'vocab_size ({config.vocab_size}) is less than the '
        f'{dataset.vocab_size} token ids of {config.dataset}: leave it out')
  skeleton = Skeleton(config)
  optimizer = optim.build(config, skeleton)
  abstract = jax.eval_shape(
      functools.partial(_init, skeleton, optimizer), jax.random.key(0))
  shardings = sharding.state_shardings(abstract, skeleton, mesh)
  template = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract, shardings)
  return Session(config, workdir, dataset, mesh, skeleton, optimizer,
                 template)


def make_workdir(workdir, config):
  """The run's folder, made and found to be writable."""
  if workdir is None:
    if jax.process_count() > 1:
      raise ValueError('several processes need a --workdir that all of them '
                       'can reach')
    kinds = '-'.join(dict.fromkeys(
        layer.variant for layer in attention.layers(config)))
    workdir = f'runs/{time.strftime("%Y-%m-%d_%H-%M-%S")}_{kinds}'
  folder = pathlib.Path(workdir).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe-{jax.process_index()}'
    probe.write_bytes(b'0' * 4096)
    probe.unlink()
  except OSError as error:
    raise ValueError(f'--workdir={workdir} cannot be written to '
                     f'({error.strerror}): choose another folder') from None
  return folder


def restore(session, store):
  """(state, step) to go on from: of the newest good checkpoint, or fresh.

  Raises:
    ValueError: the checkpoint is of another model.
  """
  for step in store.steps()[::-1][:1]:
    compatible(store.meta(step)['config'], session.config, session.workdir)
  found = store.restore(checkpoints.flatten(session.template))
  if found is None:
    return session.init_state(), 0
  step, items, meta = found
  if meta['tokenizer'] != session.dataset.tokenizer.to_json():
    raise ValueError(f'the tokenizer that {session.config.tokenizer} gives on '
                     f'{session.config.dataset} is not the one that '
                     f'{session.workdir} was trained with: use another '
                     '--workdir')
  return checkpoints.unflatten(session.template, items), step


def compatible(saved, config, workdir):
  """Raises if a flag that makes the model differs; returns what else does."""
  # A run that is older than a flag had its default.
  saved = {k: saved.get(k, f.default) for k, f in default.fields().items()}
  changed = {k: (saved[k], config[k]) for k in saved
             if k not in PLACE and _plain(saved[k]) != _plain(config[k])}
  for flag in default.model_flags():
    if flag in changed:
      before, now = changed[flag]
      raise ValueError(
          f'{flag} is {now}, but the model in {workdir} has {flag}={before}: '
          'use another --workdir, or the old value')
  return changed


def _plain(value):
  return json.loads(json.dumps(value))


def write_config(session):
  """Leaves config.json in the workdir, to be passed back as --config."""
  if jax.process_index() == 0:
    checkpoints.write_json(
        session.workdir / 'config.json', saved_config(session.config))
