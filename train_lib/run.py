"""Everything that a config stands for, checked before anything is computed."""

import dataclasses
import functools
import itertools
import pathlib
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import attention
from attention.kernels import dispatch
from configs import default
from train_lib import (
    changes,
    checkpoints,
    corpus,
    disk,
    goal,
    optim,
    plan,
    sharding,
    tasks,
)
from train_lib.state import AbstractModel, TrainState
from train_lib.tasks import dataset as task_data
from train_lib.text_slices import TextSlices

# Where a run is and what is done with it: not part of what it computes.
PLACE = ('workdir', 'mode')

# Flags that, with those of the model, say what the state consists of.
STATE = frozenset({'optimizer'})

# Flags that say together which layers there are.
LAYERS = {'attention_variant', 'attention_list'}


@dataclasses.dataclass(frozen=True)
class Run:
  """A dataset, a mesh, a model without arrays, an optimiser.

  Attributes:
    config: resolved: vocab_size and mesh as they are used.
    workdir: the run's folder.
    dataset: a corpus.Dataset, or the tasks.dataset.Dataset of a task.
    mesh: the jax Mesh.
    model: the AbstractModel.
    optimizer: the optax transformation.
    template: abstract TrainState with shardings.
  """
  config: object
  workdir: pathlib.Path
  dataset: corpus.Dataset | task_data.Dataset
  mesh: jax.sharding.Mesh
  model: AbstractModel
  optimizer: object
  template: TrainState

  def init_state(self):
    """A fresh TrainState, made where it will lie."""
    shardings = jax.tree.map(lambda x: x.sharding, self.template)
    init = functools.partial(_init, self.model, self.optimizer)
    return jax.jit(init, out_shardings=shardings)(
        jax.random.key(self.config.seed))

  def batch(self, step):
    """The global training batch of a step."""
    config = self.config
    return sharding.global_batch(
        lambda rows: self.dataset.train_batch(
            step=step, rows=rows, batch_size=config.batch_size,
            block_size=config.block_size, seed=config.seed),
        config.batch_size, self.mesh)

  @functools.cached_property
  def constants(self):
    """What a step takes beside state and batch, the same at every step.

    Arguments of the compiled program, so that runs which differ in nothing
    else share it: the learning rate of each step, where there is a table of
    them, and the seed.
    """
    values = {'rates': optim.rates(self.config),
              'seed': np.uint32(self.config.seed)}
    whole = NamedSharding(self.mesh, P())
    return jax.tree.map(lambda value: jax.make_array_from_callback(
        np.shape(value), whole, lambda _: value), values)

  def flops_per_token(self):
    """Of a training step."""
    return self.model.flops_per_token()

  def meta(self):
    """What a checkpoint says of its run, as JSON."""
    return {'config': saved_config(self.config),
            'tokenizer': self.dataset.tokenizer.to_json(),
            'dataset_sha256': self.dataset.sha256}


def _init(model, optimizer, key):
  params = model.init(key)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero)


def saved_config(config):
  """The config as JSON, without the place of the run."""
  return {k: v for k, v in config.to_dict().items() if k not in PLACE}


def check(config):
  """Raises ValueError for flags that make no sense, or not on this machine."""
  default.check(config)
  for layer in attention.layers(config):
    dispatch.check(dict(layer.flags).get(
        'attention_kernel', config.attention_kernel))
  if config.profile_steps is not None:
    steps = config.profile_steps
    if len(steps) != 2 or not all(str(s).isdigit() for s in steps):
      raise ValueError(f'profile_steps {steps} must be two steps: FIRST LAST')


def open_run(config, workdir=None, *, tokenizer=None, read_only=False):
  """Loads the data, builds the mesh and the model's structure.

  Args:
    config: a config of configs.default.get_config, left unchanged.
    workdir: folder of the run; none: a new one under runs/.
    tokenizer: of the run, where it has one; none: that of the flags.
    read_only: the folder is there and is left as it is.

  Raises:
    ValueError: one line on what does not fit.
  """
  config = config.copy_and_resolve_references()
  check(config)
  if config.attention_list:
    config.attention_list = tuple(map(str, attention.listed(config)))
  task = _task(config)
  goal.parse(config, task)  # Refused before there is a folder.
  mesh = sharding.make_mesh(config)
  plan.check_sizes(config, mesh)
  workdir = workdir or config.workdir
  workdir = folder_of(workdir) if read_only else make_workdir(workdir, config)
  dataset = task or _load_text(config, tokenizer, read_only=read_only)
  config.vocab_size = config.vocab_size or dataset.vocab_size
  if config.vocab_size < dataset.vocab_size:
    raise ValueError(
        f'vocab_size ({config.vocab_size}) is less than the '
        f'{dataset.vocab_size} token ids of {config.dataset}: leave it out')
  model = AbstractModel(config)
  optimizer = optim.build(config, model)
  abstract = jax.eval_shape(
      functools.partial(_init, model, optimizer), jax.random.key(0))
  shardings = sharding.state_shardings(abstract, model, mesh)
  template = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract, shardings)
  plan.check_state(template, config)
  return Run(config, workdir, dataset, mesh, model, optimizer, template)


def _task(config):
  """The dataset of a task, whose rows are the block_size; None for text."""
  if not tasks.named(config.dataset):
    TextSlices(config.eval_slices, config.block_size)  # Refuses what is none.
    return None
  dataset = task_data.Dataset(
      tasks.parse(config.dataset), slices=config.eval_slices)
  fields = default.fields()
  for flag in ('tokenizer', 'bin_dtype', 'packing', 'val_fraction'):
    if config[flag] != fields[flag].default:
      raise ValueError(f'{flag}={config[flag]} has no effect: --dataset='
                       f'{config.dataset} makes its own rows; leave it out')
  context = dataset.task.context
  dataset.note_block_size(
      config.block_size, default=fields['block_size'].default)
  config.block_size = context
  if config.use_abs_pos_embeddings:
    for entry, task in dataset.slices.items():
      if task.context > context:
        raise ValueError(
            f'eval_slices={entry} has rows of {task.context} tokens, more than '
            f'the {context} positions learned from --dataset={config.dataset}: '
            'give --nouse_abs_pos_embeddings')
  return dataset


def _load_text(config, tokenizer, *, read_only):
  """The corpus.Dataset of a config, long enough for what reads it."""
  dataset = corpus.load(
      config.dataset, tokenizer=tokenizer or config.tokenizer,
      packing=config.packing, val_fraction=config.val_fraction,
      bin_dtype=config.bin_dtype)
  _check_splits(config, dataset, read_only=read_only)
  return dataset


def _check_splits(config, dataset, *, read_only):
  """ValueError for a split that is too short for what will be read of it."""
  window = config.block_size + 1
  full = 2 * (read_only or config.eval_final)
  quick = window * (config.eval_interval > 0 and not read_only)
  for split, tokens, needed in (
      ('training', dataset.train, 0 if read_only else window),
      ('validation', dataset.val, max(quick, full))):
    if len(tokens) < needed:
      raise ValueError(
          f'the {split} split of {dataset.name} has {len(tokens)} tokens, '
          f'fewer than {needed}, for --val_fraction={config.val_fraction} and '
          f'--block_size={config.block_size}: change them or --dataset'
          + ', or give --eval_interval=0 --noeval_final'
          * (split == 'validation' and not read_only))


def folder_of(workdir):
  """The path of a --workdir, in which ~ is the home folder."""
  return pathlib.Path(workdir).expanduser()


def make_workdir(workdir, config):
  """The run's folder, made and found to be writable."""
  folder = _new_workdir(config) if workdir is None else folder_of(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe-{jax.process_index()}'
    probe.write_bytes(b'0' * 4096)
    probe.unlink(missing_ok=True)  # Another process may have been here.
  except OSError as error:
    raise ValueError(f'--workdir={folder} cannot be written to '
                     f'({error.strerror}): choose another folder') from None
  return folder


def _new_workdir(config):
  """A folder under runs/ that no other run has."""
  if jax.process_count() > 1:
    raise ValueError('several processes need a --workdir that all of them '
                     'can reach')
  kinds = '-'.join(dict.fromkeys(
      layer.variant for layer in attention.layers(config)))
  name = f'{time.strftime("%Y-%m-%d_%H-%M-%S")}_{kinds}'
  for n in itertools.count(1):  # Another run may start in the same second.
    folder = pathlib.Path('runs', name + (f'_{n}' if n > 1 else ''))
    try:
      folder.mkdir(parents=True)
      return folder
    except FileExistsError:
      continue
    except OSError:
      return folder  # What is wrong is told when it is made again.


def restore(run, store):
  """What to go on from: the newest good checkpoint, or a fresh start.

  Returns:
    (state, step, meta); meta is what the checkpoint says, None for a fresh
    start.

  Raises:
    ValueError: the checkpoint is of another model, optimiser or other data, or
      none of several is good.
    OSError: the system cannot read it.
  """
  found = store.restore(
      checkpoints.flatten(run.template), check=functools.partial(_check, run))
  if found is None:
    return run.init_state(), 0, None
  step, items, meta = found
  return checkpoints.unflatten(run.template, items), step, meta


def _check(run, meta):
  """Raises ValueError if a checkpoint is of another run than this one."""
  compatible(meta['config'], run.config, run.workdir, flags=STATE)
  if meta['tokenizer'] != run.dataset.tokenizer.to_json():
    raise ValueError(
        f'the tokenizer that {run.config.tokenizer} gives on '
        f'{run.config.dataset} is not the one that {run.workdir} was trained '
        'with: use another --workdir')
  changes.check_data(meta, run)


def compatible(saved, config, workdir, *, flags=frozenset()):
  """Raises ValueError if a flag that makes the model is not as it was saved.

  Args:
    saved: the config of a checkpoint, as JSON.
    config: the config to use it with.
    workdir: where it is, for the message.
    flags: more flags that must be the same.
  """
  fields, of_model = default.fields(), default.model_flags()
  if not config.use_abs_pos_embeddings:
    of_model -= {'block_size'}  # Without learned positions any will do.
  runtime = fields.keys() - of_model
  # A run that is older than a flag had its default.
  before = {f: saved.get(f, field.default) for f, field in fields.items()}
  now = dict(config)
  for values in (before, now):
    layers = attention.layers(types.SimpleNamespace(**values))
    values['layers'] = attention.shortest(
        layer.without(runtime) for layer in layers)
  for flag in (*sorted(of_model - LAYERS | flags), 'layers'):
    if before[flag] != now[flag]:
      raise ValueError(
          f'{flag} is {now[flag]}, but the run in {workdir} has '
          f'{flag}={before[flag]}: use another --workdir, or the old value')


def write_config(run):
  """Leaves config.json in the workdir, to be passed back as --config."""
  if jax.process_index() == 0:
    disk.write_json(
        run.workdir / 'config.json', saved_config(run.config))
