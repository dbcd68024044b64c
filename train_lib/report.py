"""The header before a run, and the table and the sample after it."""

import contextlib
import math

import jax
import numpy as np

import attention
from model import sample
from train_lib import (
    bigram,
    changes,
    metrics,
    optim,
    sharding,
    task_report,
    tokenizer,
)
from train_lib.tasks import dataset as task_data

SAMPLE_TOKENS = 500


def header(run, first, choices, meta=None):
  """What is about to run, as text.

  Args:
    run: the Run.
    first: the step that it starts from.
    choices: what dispatch recorded while the step was traced.
    meta: what the checkpoint that it starts from says of its run.
  """
  config, dataset = run.config, run.dataset
  devices = jax.devices()
  tokens = config.batch_size * config.block_size
  rows = [
      ('devices', f'{len(devices)} x {devices[0].device_kind}, '
       f'{jax.process_count()} process(es)'),
      ('mesh', ' x '.join(f'{a} {n}' for a, n in run.mesh.shape.items())),
      ('layers', f'{config.n_layer}: {_layers(config)}'),
      ('parameters', f'{run.model.n_params():,}'),
      ('state', '{:,} bytes + {:,} a token, to decode a sequence'.format(
          *run.model.module.state_bytes())),
      ('kernels', kernels(choices)),
      ('data', _data(dataset, config)),
      ('step', f'{tokens:,} tokens, '
       f'{tokens * run.flops_per_token():.3g} FLOPs'),
      ('workdir', str(run.workdir)),
  ]
  split = sharding.replicated(run.model, run.mesh)
  if split:
    rows.insert(2, ('replicated', 'the mesh does not divide ' + ', '.join(
        split)))
  if config.stop_when:
    rows.append(('ends', f'when {config.stop_when}, or after '
                 f'{config.max_iters:,} steps'))
  if first:
    rows.append(('resumed', f'from step {first:,} of {config.max_iters:,}'))
  rows += notes([*dataset.notes, *optim.notes(config)])
  changed = changes.lines(meta['config'], config, first) if meta else []
  return '\n'.join([metrics.table(rows), *changed])


def _data(dataset, config):
  if isinstance(dataset, task_data.Dataset):
    return task_report.header(dataset)
  return (f'{dataset.name}: {len(dataset.train):,} + {len(dataset.val):,} '
          f'{config.tokenizer} tokens, {dataset.vocab_size:,} ids, sha256 '
          f'{dataset.sha256[:12]}')


def evaluation(dataset, result):
  """Rows of what evaluate.Evaluator.full gave, for a table."""
  if isinstance(dataset, task_data.Dataset):
    return task_report.accuracies(dataset, result)
  return [(name, metrics.short(value)) for name, value in result.items()]


def notes(lines):
  """Rows of what should be known before numbers are believed."""
  return [('note', line) for line in lines]


def _layers(config):
  layers = attention.layers(config)
  period = attention.period(layers)
  return attention.shortest(period) + (
      ' repeated' if 1 < len(period) < len(layers) else '')


def kernels(choices):
  """Which implementation of every kernel the traced programs use."""
  chosen = {op.rsplit('.', 1)[-1]: names for op, names in choices.items()}
  return '; '.join(
      f'{op}: ' + ', '.join(name + (f' ({why})' if why else '')
                            for name, why in names.items())
      for op, names in chosen.items()) or 'none needed'


def compiled(step, seconds):
  """What the compiled step needs, as text."""
  stats = step.memory_analysis()
  if stats is None:
    return f'compiled in {seconds:.1f} s'
  total = (stats.argument_size_in_bytes + stats.output_size_in_bytes
           - stats.alias_size_in_bytes + stats.temp_size_in_bytes)
  return (f'compiled in {seconds:.1f} s; a step needs '
          f'{total / 2 ** 20:,.0f} MiB per device')


def finish(run, state, *, evaluator, log):
  """Evaluates the whole validation split, shows what the model does with it.

  Of a text the losses and a sample, of a task the accuracies and examples.

  Args:
    run: the Run.
    state: the TrainState that it ends with.
    evaluator: the run's evaluate.Evaluator.
    log: the metrics.Logger.
  """
  final = evaluator.full(state.params) if run.config.eval_final else {}
  if final:
    log.write(int(state.step), final)
  if isinstance(run.dataset, task_data.Dataset):
    rows = task_report.accuracies(run.dataset, final) if final else []
    show = task_report.examples
  else:
    rows, show = _losses(run, final, evaluator, log), _sample
  rows.append(('run', str(run.workdir)))
  log.close_bar()
  log.say('\n' + metrics.table(rows))
  if jax.process_count() == 1:
    log.say('\n' + show(run, state))


def _losses(run, final, evaluator, log):
  """Rows of a text's losses, for a table."""
  config, rows = run.config, []
  if final:
    rows.append(('validation loss', f'{final["val_loss_full"]:.4f} nats a '
                 f'token, over all {final["val_tokens"]:,} tokens'))
    if 'bits_per_byte' in final:
      lost = final.get('lost_characters')
      rows.append(('', f'{final["bits_per_byte"]:.4f} bits a byte' + (
          f', without those of {lost:,} characters that the tokenizer loses'
          if lost else '')))
      rows += [(name.removeprefix('val_loss_full'), f'{value:.4f} nats a token')
             for name, value in final.items()
             if name.startswith('val_loss_full[')]
  losses = [r['val_loss'] for r in log.history
            if math.isfinite(r.get('val_loss', math.nan))]
  if losses:
    windows = config.eval_iters * evaluator.batch_size
    rows.append(('best evaluation', f'{min(losses):.4f} nats a token, over '
                 f'{windows * config.block_size:,} tokens in {windows:,} fixed '
                 'windows'))
  if len(run.dataset.val) > 1:
    rows.append(('bigram', f'{bigram.loss(run.dataset):.4f}: what a table of '
                 'pairs, counted on the training split, gives on the '
                 'validation split'))
  entropy = bigram.entropy(run.dataset.train)
  rows.append(('', f'{entropy:.4f}: the entropy of the pairs of the training '
               'split'))
  speed = [r['tokens_per_s'] for r in log.history if 'tokens_per_s' in r]
  if speed:
    rows.append(('speed', f'{np.median(speed):,.0f} tokens/s'))
  return rows


def _sample(run, state):
  """A title and a text that continues the prompt, if it can be encoded."""
  config, vocabulary = run.config, run.dataset.tokenizer
  params = jax.device_put(state.params, jax.devices()[0])
  title, ids = 'sample:', []
  with contextlib.suppress(ValueError):
    ids = vocabulary.encode(config.prompt)
  if not len(ids):
    title = (f'sample, from the first token of the text: {config.tokenizer} '
             f'has no tokens for --prompt={config.prompt!r}')
    ids = run.dataset.train[:1]
  drawn = sample.generate(
      run.model.merge(params), [ids], key=jax.random.key(config.seed),
      max_new_tokens=min(config.max_new_tokens, SAMPLE_TOKENS),
      temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
  return f'{title}\n{vocabulary.decode(ids)}' + ''.join(tokenizer.stream(
      vocabulary, (i for chunk in drawn for i in chunk[0]), after=ids))
