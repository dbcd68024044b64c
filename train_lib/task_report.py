"""What a run of a task tells in its header and at its end."""

import jax
import numpy as np

from train_lib import loss, metrics

EXAMPLES = 3
LONGEST = 60  # tokens of an example that are shown, the last ones


def header(dataset):
  """The task, its rows, chance and when it is solved, as text."""
  task = dataset.task
  rows = 'fresh ones every step' if task.rows is None else f'{task.rows:,}'
  return (f'{dataset.name}: {task.context} tokens a row, at most {task.labels} '
          f'labels, {dataset.vocab_size:,} ids, rows: {rows}; accuracy: chance '
          f'{task.chance:.4f}, solved from {task.solved}')


def accuracies(dataset, final):
  """Rows of the accuracies of an evaluation, for a table.

  Args:
    dataset: the tasks.dataset.Dataset.
    final: what evaluate.Evaluator.full gave.
  """
  rows = []
  tasks = {'': dataset.task} | {
      f'[{entry}]': task for entry, task in dataset.slices.items()}
  for mark, task in tasks.items():
    found = final[f'val_accuracy_full{mark}']
    verdict = 'solved' if found >= task.solved else (
        f'not solved, which is from {task.solved}')
    rows.append((f'accuracy{mark}', f'{found:.4f}: {verdict}; chance '
                 f'{task.chance:.4f}; loss '
                 f'{final[f"val_loss_full{mark}"]:.4f} nats a label'))
  return rows


def examples(run, state):
  """Validation rows: their input, what is wanted, and what the model says."""
  task = run.dataset.task
  batch = run.dataset.eval_batch(
      index=0, rows=slice(None), batch_size=EXAMPLES,
      block_size=task.context)
  params = jax.device_put(state.params, jax.devices()[0])

  @jax.jit
  def likeliest(params):
    module = run.model.merge(params)
    hidden, _ = module.hidden(loss.targets_of(batch)[0])
    return module.logits(loss.at_targets(hidden, batch)).argmax(-1)

  said = ['examples:']
  for tokens, wanted, got in zip(
      batch['tokens'], batch['targets'], np.asarray(likeliest(params))):
    tokens, valid = tokens[tokens >= 0].tolist(), wanted >= 0
    cut = '... ' * (len(tokens) > LONGEST)
    rows = [('input', cut + task.show(tokens[-LONGEST:]))] + [
        (name, task.show(ids[valid].tolist()))
        for name, ids in (('wanted', wanted), ('got', got))]
    said.append(metrics.table(rows))
  return '\n'.join(said)
