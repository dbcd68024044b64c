"""Every flag once: name, type, default and one line of help.

Flags of the attention variants are declared by the variants (`Options` in
attention/<variant>.py and attention/common/options.py) and joined in here.
"""

import dataclasses

from ml_collections import config_dict

import attention
from attention.common import options
from attention.common.options import option, types

ATTENTION = 'Attention'  # The title of the variants' flags.


@dataclasses.dataclass(frozen=True)
class Run:
  """What to do, and where"""
  mode: str = option(
      'train', 'what to do',
      choices=('train', 'eval', 'sample', 'sweep', 'report'))
  workdir: str | None = option(
      None, 'folder of the run; an existing one is resumed. none: a new one '
      'under runs/, or that of the sweep')
  distributed: str = option(
      'auto', 'join several processes (jax.distributed)',
      choices=('auto', 'yes', 'no'))
  kernel_check: str = option(
      'auto', 'whether Pallas kernels prove themselves on this device before '
      'they are used; auto: once for a device, a version and a model',
      choices=('auto', 'always', 'off'))
  seed: int = option(
      1337, 'seed of parameters, batches, dropout and samples', at_least=0)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Many runs: --mode=sweep"""
  sweep: str | None = option(
      None, 'a Python file whose sweep() yields dicts of flags, or an '
      'exploration .yaml of ReaLLM-Forge')
  sweep_shard: str | None = option(
      None, 'I/N: only every Nth run, from the Ith (1 to N) on, for array jobs')
  sweep_workers: int = option(
      1, 'processes that make the runs, each with its share of the cores or '
      'of the GPUs', at_least=1)
  sweep_slurm: int = option(
      0, 'array jobs of Slurm that make the runs, a shard each; 0: none',
      at_least=0)
  sweep_slurm_args: str | None = option(
      None, "what Slurm is asked for: 'partition=gpu time=60 gpus_per_node=1', "
      'time in minutes; others are in docs/sweeps.md')
  dry_run: bool = option(
      False, 'list the runs and what each costs, and start none')
  match: str = option(
      'none', 'what all runs are given as much of as the first has: parameters '
      'or FLOPs by the width of the mlp, bytes of decode state by the flag '
      "that scales a variant's", choices=('none', 'params', 'flops', 'state'))


@dataclasses.dataclass(frozen=True)
class Layers:
  """Which attention"""
  attention_variant: str = option(
      'causal', 'mixer of every layer', choices=attention.names())
  attention_list: tuple | None = option(
      None, 'layers, tiled over n_layer: name, name(flag=value, ...) or '
      '3*name; overrides attention_variant')


@dataclasses.dataclass(frozen=True)
class Model:
  """Model"""
  n_layer: int = option(4, 'layers', at_least=1, at_most=10_000)
  n_head: int = option(4, 'query heads', at_least=1)
  n_embd: int = option(128, 'model width', at_least=1)
  block_size: int = option(128, 'longest context, in tokens', at_least=1)
  vocab_size: int | None = option(
      None, 'token ids, at least those of the dataset; none: just those',
      at_least=1)
  bias: bool = option(False, 'biases in dense layers and layer norms')
  dropout: float = option(
      0.0, 'dropout on the residual branches', runtime=True, at_least=0,
      below=1)
  mlp_variant: str = option(
      'gelu', 'feed-forward network', choices=('gelu', 'swiglu'))
  mlp_width: int | None = option(
      None, 'width of the mlp; none: 4 n_embd (gelu), 8/3 n_embd (swiglu)',
      at_least=1)
  norm_variant: str = option(
      'rmsnorm', 'norm of the blocks', choices=('rmsnorm', 'layernorm'))
  use_abs_pos_embeddings: bool = option(True, 'learned position embeddings')
  tie_embeddings: bool = option(True, 'the head is the token embedding')
  final_logit_softcapping: float | None = option(
      None, 'logits become cap tanh(logit / cap); bare flag: 30, none: off',
      bare=30.0, at_least=0)
  init_std: float = option(
      0.05, 'standard deviation of initial weights; GPT-2 has 0.02',
      runtime=True, at_least=0)
  compute_dtype: str = option(
      'float32', 'of activations; parameters, norms, softmax and loss are '
      'float32', runtime=True, choices=('float32', 'bfloat16'))
  remat: str = option(
      'none', 'what the backward pass recomputes; dots: all but matrix '
      'products', runtime=True, choices=('none', 'full', 'dots'))
  scan_unroll: int = option(
      0, 'periods of layers unrolled in the scan over depth; 0: all',
      runtime=True, at_least=0)


@dataclasses.dataclass(frozen=True)
class Data:
  """Data"""
  dataset: str = option(
      'pydoc', 'pydoc, shakespeare_char, a text file, a folder of text files, '
      'a nanoGPT folder, hf:NAME, or task:NAME(option=value, ...), of '
      'docs/tasks.md')
  tokenizer: str = option(
      'byte', 'byte, char, bpe:SIZE or a tokenizer.json')
  bin_dtype: str | None = option(
      None, 'ids in a train.bin; none: as its meta.pkl says, or uint16',
      choices=('uint16', 'uint32'))
  packing: bool = option(
      False, 'documents never see each other within a row')
  allow_changed_data: bool = option(
      False, 'resume although the content of the dataset is another one')
  val_fraction: float = option(
      0.1, 'last part of the data, for validation', at_least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Training:
  """Training"""
  max_iters: int = option(1000, 'optimiser steps', at_least=0)
  stop_when: str | None = option(
      None, "end before max_iters, once a validation finds this: 'loss < 1.5', "
      "'accuracy > 0.99' of a task, or what has been spent: 'tokens > 1e6', "
      "'seconds > 60'")
  batch_size: int = option(8, 'rows of a step, over all devices', at_least=1)
  gradient_accumulation_steps: int = option(
      1, 'parts into which a step splits its rows', at_least=1)
  z_loss: float = option(
      0.0, 'weight of the squared log normaliser', at_least=0)
  nan_policy: str = option(
      'stop', 'at a loss that is not finite: stop, or skip the update',
      choices=('stop', 'skip'))
  nan_patience: int = option(
      20, 'with nan_policy=skip: steps in a row that are skipped before the '
      'run stops', at_least=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Optimiser"""
  optimizer: str = option(
      'adamw', 'optimiser',
      choices=('adamw', 'lion', 'adafactor', 'muon', 'sgd'))
  learning_rate: float = option(3e-3, 'peak learning rate', at_least=0)
  lr_schedule: str = option(
      'cosine', 'learning rate after warm-up',
      choices=('constant', 'cosine', 'linear', 'wsd'))
  min_lr: float = option(1e-4, 'final learning rate', at_least=0)
  warmup_iters: int = option(100, 'steps of linear warm-up', at_least=0)
  lr_decay_iters: int | None = option(
      None, 'step at which min_lr is reached; none: max_iters', at_least=1)
  weight_decay: float = option(
      0.1, 'weight decay, of matrices alone', at_least=0)
  beta1: float = option(
      0.9, 'first moment decay, or momentum', at_least=0, below=1)
  beta2: float = option(0.99, 'second moment decay', at_least=0, below=1)
  grad_clip: float = option(
      1.0, 'largest global gradient norm; 0: any', at_least=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluation and checkpoints"""
  eval_interval: int = option(
      250, 'steps between evaluations; 0: never', at_least=0)
  eval_iters: int = option(
      20, 'validation batches of an evaluation, the same ones every time',
      at_least=1)
  eval_batch_size: int | None = option(
      None, 'rows of a validation batch; none: batch_size', at_least=1)
  eval_final: bool = option(
      True, 'evaluate the whole validation split at the end')
  eval_slices: tuple | None = option(
      None, 'more columns of an evaluation: of text position and repeats(n=3), '
      'of a task with other options length=128 or (length=128, pairs=16)')
  checkpoint_interval: int | None = option(
      None, 'steps between checkpoints; none: eval_interval, 0: only the last',
      at_least=0)


@dataclasses.dataclass(frozen=True)
class Logging:
  """Logging"""
  log_interval: int = option(50, 'steps between lines of metrics', at_least=1)
  tensorboard: bool = option(False, 'write TensorBoard events')
  wandb: str | None = option(None, 'Weights & Biases project to log to')
  wandb_name: str | None = option(
      None, 'name of the run there; none: that of its folder')
  wandb_group: str | None = option(None, 'group of runs there')
  wandb_notes: str | None = option(None, 'what is to be said of the run there')
  profile_steps: tuple | None = option(
      None, 'FIRST LAST: steps of a jax profiler trace')


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """Mesh: batch over data and fsdp, parameters over fsdp, heads over tensor"""
  mesh_data: int = option(
      -1, 'copies of the model; -1: what is left', at_least=-1)
  mesh_fsdp: int = option(
      1, 'shards of every copy, along the model width', at_least=-1)
  mesh_tensor: int = option(1, 'shards of heads and mlp width', at_least=-1)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling"""
  prompt: str = option('\n', 'text to continue', empty=True, once=True)
  num_samples: int = option(1, 'continuations', at_least=1)
  max_new_tokens: int = option(500, 'tokens of each continuation', at_least=1)
  temperature: float = option(
      0.8, 'divides the logits; 0: the likeliest', at_least=0)
  top_k: int | None = option(
      200, 'sample from the k likeliest; none: all', at_least=1)
  top_p: float | None = option(
      None, 'sample from the likeliest that make up p; none: all', above=0,
      at_most=1)


def groups():
  """{title: {flag: field}} of every flag; those of attention come last."""
  tables = {
      t.__doc__: {f.name: f for f in dataclasses.fields(t)}
      for t in (Run, Sweep, Layers, Model, Data, Training, Optimizer,
                Evaluation, Logging, MeshShape, Sampling)}
  taken = {flag for table in tables.values() for flag in table}
  honoured = tables[ATTENTION] = {}
  for name in attention.names():
    for flag, field in attention.flags(name).items():
      if flag in taken:
        raise ValueError(f'{flag} of {name} is taken: prefix it with {name}_')
      first = honoured.setdefault(flag, field)
      if (first.default, first.type) != (field.default, field.type):
        raise ValueError(f'{flag} has two defaults: {name} has another one '
                         f'than {attention.users(flag)[0]}')
  return tables


def fields():
  """{flag: field} of every flag."""
  return {flag: f for table in groups().values() for flag, f in table.items()}


def model_flags():
  """The set of flags that a model's parameters cannot be used without."""
  own = [f for table in (Layers, Model) for f in dataclasses.fields(table)]
  own += [f for n in attention.names() for f in attention.flags(n).values()]
  own += [f for f in dataclasses.fields(Data) if f.name == 'tokenizer']
  return {f.name for f in own if not f.metadata['runtime']}


def get_config():
  """The default config: every flag, with its default, locked."""
  config = config_dict.ConfigDict()
  for flag, field in fields().items():
    kind, optional = types(field)
    config[flag] = config_dict.placeholder(kind) if optional else field.default
    if optional and field.default is not None:
      config[flag] = field.default
  return config.lock()


def check(config):
  """Raises ValueError for what no run or model can be made of.

  One line that names the flag, its value and the way out.
  """
  check_flags(**config)
  attention.check(config)


def check_flags(**values):
  """Raises ValueError for a value out of its flag's range or choices."""
  every = fields()
  for flag, value in values.items():
    options.check(every[flag], value)
