"""The modes that read a run: --mode=eval and --mode=sample."""

import jax
from jax.sharding import SingleDeviceSharding

from model import sample
from train_lib import (
    checkpoints,
    evaluate,
    kernel_check,
    metrics,
    plan,
    report,
    tasks,
    tokenizer,
)
from train_lib import run as run_lib
from train_lib.state import AbstractModel


def _store(workdir, mode):
  if not workdir:
    raise ValueError(f'--mode={mode} needs --workdir: the folder of a run')
  if not (run_lib.folder_of(workdir) / 'checkpoints').is_dir():
    raise ValueError(f'--workdir={workdir} has no checkpoints: train there '
                     'first, or name another folder')
  return checkpoints.Checkpoints(run_lib.folder_of(workdir), read_only=True)


@kernel_check.proven
def evaluate_run(config, workdir=None):
  """Loss of a run's best checkpoint over its whole validation split.

  Args:
    config: the run's config; the dataset may be another one.
    workdir: folder of the run, config.workdir by default.

  Returns:
    A dict as of evaluate.Evaluator.full.
  """
  config = config.copy_and_resolve_references()
  config.stop_when = None  # Of the training, and of its columns.
  with _store(workdir or config.workdir, 'eval') as store:
    run = run_lib.open_run(
        config, workdir, tokenizer=_tokenizer(store), read_only=True)
    _check_model(store, run.config, run.workdir)
    step, items, _ = _restore(store, run.template.params)
    result = evaluate.Evaluator(run).full(items['params'])
  print(metrics.table([('step', f'{step:,}'),
                       *report.evaluation(run.dataset, result),
                       *report.notes(run.dataset.notes)]))
  return result


def _tokenizer(store):
  """The tokenizer of the run: of other data, flags would make another one."""
  steps = store.steps()
  return tokenizer.from_json(
      store.meta(steps[-1])['tokenizer']) if steps else None


def _check_model(store, config, workdir):
  """Raises if the newest checkpoint is not of the config's model.

  A vocab_size that the config leaves open is filled in.
  """
  if store.steps():
    saved = store.meta(store.steps()[-1])['config']
    config.vocab_size = config.vocab_size or saved['vocab_size']
    run_lib.compatible(saved, config, workdir)


def _restore(store, params):
  """(step, items, meta) of the best checkpoint with these parameters."""
  found = store.restore({'params': params}, best=True)
  if found is None:
    raise ValueError(f'{store.workdir} has no finished checkpoint yet')
  return found


def load(workdir, config):
  """(model, tokenizer, step) of a run's best checkpoint, on one device.

  Args:
    workdir: folder of the run.
    config: the run's config; flags that make the model must be as trained.
  """
  config = config.copy_and_resolve_references()
  with _store(workdir, 'sample') as store:
    _check_model(store, config, workdir)
    abstract = AbstractModel(config)
    device = SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
              for name, x in abstract.shapes.items()}
    step, items, meta = _restore(store, wanted)
  model = abstract.merge(items['params'])
  return model, tokenizer.from_json(meta['tokenizer']), step


@kernel_check.proven
def sample_run(config, workdir=None):
  """Prints continuations of config.prompt; a single one as it is drawn.

  Args:
    config: the run's config with the flags of sampling.
    workdir: folder of the run, config.workdir by default.

  Returns:
    The texts, prompt included.
  """
  if tasks.named(config.dataset):
    raise ValueError(f'--mode=sample continues text, and --dataset='
                     f'{config.dataset} is a task: use --mode=eval')
  rule = dict(temperature=config.temperature, top_k=config.top_k,
              top_p=config.top_p, max_new_tokens=config.max_new_tokens)
  model, vocabulary, _ = load(workdir or config.workdir, config)
  ids = vocabulary.encode(config.prompt)
  if model.longest and len(ids) > model.block_size:
    print(f'note: the prompt has {len(ids)} tokens; the last '
          f'{model.block_size} (block_size) are kept')
  plan.check_samples(model, ids, config)
  chunks = sample.generate(
      model, [ids] * config.num_samples, key=jax.random.key(config.seed),
      **rule)
  if config.num_samples == 1:
    pieces = [config.prompt]
    print(config.prompt, end='', flush=True)
    drawn = (token for chunk in chunks for token in chunk[0])
    for piece in tokenizer.stream(vocabulary, drawn, after=ids):
      print(piece, end='', flush=True)
      pieces.append(piece)
    print()
    return [''.join(pieces)]
  rows = [list(ids) for _ in range(config.num_samples)]
  for chunk in chunks:
    for row, new in zip(rows, chunk):
      row.extend(new)
  texts = [vocabulary.decode(row) for row in rows]
  print('\n---\n'.join(texts))
  return texts
