"""Folders as finished runs leave them, made without any training."""

import json

from configs import default


def write(folder, score, *, metric='val_loss_full', finished=True, more=None,
          **flags):
  """A run's folder with a score at its end.

  Args:
    folder: its path.
    score: the last value of the metric.
    metric: its name.
    finished: whether its record says so.
    more: {column: value} of the last row.
    **flags: of its config, beside the defaults.
  """
  config = {**default.get_config().to_dict(), 'max_iters': 20,
            'vocab_size': 256, **flags}
  quick = metric.removesuffix('_full')
  rows = [{'step': step, 'loss': score + 10 / step, quick: score + 5 / step,
           'tokens': 1024 * step, 'elapsed_s': 0.1 * step}
          for step in (5, 10, 20)]
  rows[-1].update({metric: score, **(more or {})})
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'metrics.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in rows))
  state = {'causal': (12, 4096), 'identity': (0, 0)}.get(
      config['attention_variant'], (9000, 0))
  (folder / 'run.json').write_text(json.dumps({
      'command': 'python main.py', 'commit': '0123456789ab', 'jax': '0.10.2',
      'devices': '1 x cpu', 'kernels': 'flash: xla', 'parameters': 1000,
      'state_bytes': state[0], 'state_bytes_per_token': state[1],
      'flops_per_token': 6000, 'finished': 20 if finished else None}))


def grid(root, scores, **flags):
  """Runs of {variant: {learning rate: a score for each seed}}."""
  for variant, rates in scores.items():
    for rate, seeds in rates.items():
      for seed, score in enumerate(seeds):
        write(root / f'{variant},{rate},{seed}', score, seed=seed,
              attention_variant=variant, learning_rate=rate, **flags)
