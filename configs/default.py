"""Every flag once: name, type, default and one line of help.

Flags of the attention variants are declared by the variants (`Options` in
attention/<variant>.py and attention/common/options.py) and joined in here.
"""

import dataclasses

from ml_collections import config_dict

import attention
from attention.common.options import option


@dataclasses.dataclass(frozen=True)
class Run:
  """What to do, and where"""
  mode: str = option('train', 'train, eval or sample')
  workdir: str | None = option(
      None, 'folder of the run; an existing one is resumed. none: a new one '
      'under runs/')
  distributed: str = option(
      'auto', 'join several processes (jax.distributed): auto, yes or no')
  seed: int = option(1337, 'seed of parameters, batches, dropout and samples')


@dataclasses.dataclass(frozen=True)
class Layers:
  """Which attention"""
  attention_variant: str = option(
      'causal', 'mixer of every layer: ' + ', '.join(attention.names()))
  attention_list: tuple | None = option(
      None, 'mixers tiled over the layers; overrides attention_variant')


@dataclasses.dataclass(frozen=True)
class Model:
  """Model"""
  n_layer: int = option(4, 'layers')
  n_head: int = option(4, 'query heads')
  n_embd: int = option(128, 'model width')
  block_size: int = option(128, 'longest context, in tokens')
  vocab_size: int | None = option(
      None, 'token ids, at least those of the dataset; none: just those')
  bias: bool = option(False, 'biases in dense layers and layer norms')
  dropout: float = option(
      0.0, 'dropout on the residual branches', runtime=True)
  mlp_variant: str = option('gelu', 'gelu or swiglu')
  mlp_width: int | None = option(
      None, 'width of the mlp; none: 4 n_embd (gelu), 8/3 n_embd (swiglu)')
  norm_variant: str = option('rmsnorm', 'rmsnorm or layernorm')
  use_abs_pos_embeddings: bool = option(True, 'learned position embeddings')
  tie_embeddings: bool = option(True, 'the head is the token embedding')
  init_std: float = option(
      0.05, 'standard deviation of initial weights; GPT-2 has 0.02',
      runtime=True)
  compute_dtype: str = option(
      'float32', 'float32 or bfloat16; parameters, norms, softmax and loss '
      'are float32', runtime=True)
  remat: str = option(
      'none', 'what the backward pass recomputes: none, full, dots (all but '
      'matrix products)', runtime=True)
  scan_unroll: int = option(
      0, 'periods of layers unrolled in the scan over depth; 0: all',
      runtime=True)


@dataclasses.dataclass(frozen=True)
class Data:
  """Data"""
  dataset: str = option(
      'pydoc', 'pydoc, shakespeare_char, a text file, a folder of text files, '
      'a nanoGPT folder, or hf:NAME')
  tokenizer: str = option(
      'byte', 'byte, char, bpe:SIZE or a tokenizer.json')
  packing: bool = option(
      False, 'documents never see each other within a row')
  val_fraction: float = option(0.1, 'last part of the data, for validation')


@dataclasses.dataclass(frozen=True)
class Training:
  """Training"""
  max_iters: int = option(1000, 'optimiser steps')
  batch_size: int = option(8, 'rows of a step, over all devices')
  gradient_accumulation_steps: int = option(
      1, 'parts into which a step splits its rows')
  z_loss: float = option(0.0, 'weight of the squared log normaliser')
  nan_policy: str = option(
      'stop', 'at a loss that is not finite: stop, or skip the update')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Optimiser"""
  optimizer: str = option('adamw', 'adamw, lion, adafactor, muon or sgd')
  learning_rate: float = option(3e-3, 'peak learning rate')
  lr_schedule: str = option(
      'cosine', 'after warm-up: constant, cosine, linear or wsd')
  min_lr: float = option(1e-4, 'final learning rate')
  warmup_iters: int = option(100, 'steps of linear warm-up')
  lr_decay_iters: int | None = option(
      None, 'step at which min_lr is reached; none: max_iters')
  weight_decay: float = option(0.1, 'weight decay, of matrices alone')
  beta1: float = option(0.9, 'first moment decay, or momentum')
  beta2: float = option(0.99, 'second moment decay')
  grad_clip: float = option(1.0, 'largest global gradient norm; 0: any')


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluation and checkpoints"""
  eval_interval: int = option(250, 'steps between evaluations; 0: never')
  eval_iters: int = option(
      20, 'validation batches of an evaluation, the same ones every time')
  eval_final: bool = option(
      True, 'evaluate the whole validation split at the end')
  checkpoint_interval: int | None = option(
      None, 'steps between checkpoints; none: eval_interval, 0: only the last')


@dataclasses.dataclass(frozen=True)
class Logging:
  """Logging"""
  log_interval: int = option(50, 'steps between lines of metrics')
  tensorboard: bool = option(False, 'write TensorBoard events')
  wandb: str | None = option(None, 'Weights & Biases project to log to')
  profile_steps: tuple | None = option(
      None, 'FIRST LAST: steps of a jax profiler trace')


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """Mesh: batch over data and fsdp, parameters over fsdp, heads over tensor"""
  mesh_data: int = option(-1, 'copies of the model; -1: what is left')
  mesh_fsdp: int = option(1, 'shards of every copy, along the model width')
  mesh_tensor: int = option(1, 'shards of heads and mlp width')


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling"""
  prompt: str = option('\n', 'text to continue')
  num_samples: int = option(1, 'continuations')
  max_new_tokens: int = option(500, 'tokens of each continuation')
  temperature: float = option(0.8, 'divides the logits; 0: the likeliest')
  top_k: int | None = option(200, 'sample from the k likeliest; none: all')
  top_p: float | None = option(
      None, 'sample from the likeliest that make up p; none: all')


def groups():
  """{title: {flag: field}} of every flag, in the order of --help."""
  tables = {
      t.__doc__: {f.name: f for f in dataclasses.fields(t)}
      for t in (Run, Layers, Model, Data, Training, Optimizer, Evaluation,
                Logging, MeshShape, Sampling)}
  taken = {flag for table in tables.values() for flag in table}
  honoured = {}
  for name in attention.names():
    for flag, field in attention.flags(name).items():
      if flag in taken:
        raise ValueError(f'{flag} of {name} is taken: prefix it with {name}_')
      before, users = honoured.setdefault(flag, (field, []))
      if (before.default, before.type) != (field.default, field.type):
        raise ValueError(f'{flag} has two defaults: {users[0]}, {name}')
      users.append(name)
  for flag, (field, users) in honoured.items():
    title = 'Attention: ' + ', '.join(users)
    tables.setdefault(title, {})[flag] = field
  return tables


def fields():
  """{flag: field} of every flag."""
  return {flag: f for table in groups().values() for flag, f in table.items()}


def model_flags():
  """The flags that a model's parameters cannot be used without."""
  own = [f for table in (Layers, Model) for f in dataclasses.fields(table)]
  own += [f for n in attention.names() for f in attention.flags(n).values()]
  own += [f for f in dataclasses.fields(Data) if f.name == 'tokenizer']
  return sorted({f.name for f in own if not f.metadata['runtime']})


def types(field):
  """(type, whether the flag may be none) of a flag."""
  options = getattr(field.type, '__args__', (field.type,))
  kinds = [t for t in options if t is not type(None)]
  return kinds[0], len(options) > len(kinds)


def get_config():
  """The default config: every flag, with its default, locked."""
  config = config_dict.ConfigDict()
  for flag, field in fields().items():
    kind, optional = types(field)
    config[flag] = config_dict.placeholder(kind) if optional else field.default
    if optional and field.default is not None:
      config[flag] = field.default
  return config.lock()
