"""Trains the default job with every variant, and measures each.

  python benchmarks/variants.py
  python benchmarks/variants.py --variants ssm causal,causal,ssm --seeds 1

Every variant has the positions that suit it, rotary beside the learned ones
where it has the flag, and as many parameters as causal: the width of the mlp is
what gives. A variant with commas is an attention_list. Prints a Markdown table:
parameters, validation loss over the whole split (mean and standard deviation
over the seeds), ms a training step, tokens a second of decoding, bytes of
decoding state at two lengths. Times are of this machine, one variant after the
other; compare them within one run of the script.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import jax
import numpy as np

import attention
from configs import default
from model import sample
from train_lib import bigram, corpus, cpu, inference, matching, trainer
from train_lib.state import AbstractModel

LENGTHS = (1024, 65536)
DECODED = 256
LIKE = 'causal'  # has the parameters that the others are given


def config_of(kinds, max_iters):
  """The default config with a variant, or with a list of them."""
  config = default.get_config()
  config.attention_list = tuple(kinds.split(','))
  config.max_iters = max_iters or config.max_iters
  config.log_interval = min(config.log_interval, config.max_iters)
  config.vocab_size = 256
  config.use_rotary_embeddings = any(
      'use_rotary_embeddings' in attention.flags(layer.variant)
      for layer in attention.layers(config))
  return config


def decode_speed(model):
  """Tokens a second of one sequence, after the first call has compiled."""
  prompt = [np.zeros(8, np.int32)]
  rates = []
  for _ in range(4):
    start = time.perf_counter()
    for _ in sample.generate(model, prompt, max_new_tokens=DECODED,
                             key=jax.random.key(0)):
      pass
    rates.append(DECODED / (time.perf_counter() - start))
  return max(rates[1:])


def row(kinds, flags):
  """The cells of one variant."""
  config = config_of(kinds, flags.max_iters)
  config.mlp_width = matching.mlp_width(config, AbstractModel(
      config_of(LIKE, flags.max_iters)).n_params(), kinds)
  losses, speed = [], []
  for seed in range(flags.seeds):
    config.seed = 1337 + seed
    with tempfile.TemporaryDirectory() as workdir:
      history = trainer.train(config, workdir)
      model, *_ = inference.load(workdir, config)
    losses.append(history[-1]['val_loss_full'])
    speed += [r['ms_per_step'] for r in history if 'ms_per_step' in r]
  constant, per_token = model.state_bytes()
  size = sum(x.size for x in jax.tree.leaves(model))
  spread = f' ± {statistics.stdev(losses):.3f}' if len(losses) > 1 else ''
  return [f'`{kinds.replace(",", " ")}`', f'{size:,}',
          f'{statistics.mean(losses):.3f}{spread}',
          f'{statistics.median(speed):.1f}', f'{decode_speed(model):,.0f}',
          *(f'{constant + length * per_token:,}' for length in LENGTHS)]


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--variants', nargs='+',
                      default=[*attention.names(), 'causal,causal,ssm'])
  parser.add_argument('--max_iters', type=int, default=0,
                      help='steps; 0: those of the default job')
  parser.add_argument('--seeds', type=int, default=3)
  flags = parser.parse_args()
  cpu.keep_memory()
  dataset = corpus.load('pydoc')
  entropy = bigram.entropy(dataset.train)
  print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}; '
        f'{flags.seeds} seed(s); bigram entropy {entropy:.3f}, a table of '
        f'pairs gives {bigram.loss(dataset):.3f}\n')
  head = ['variant', 'parameters', 'validation loss', 'ms/step',
          'decoded tokens/s', *(f'state bytes, T = {n:,}' for n in LENGTHS)]
  rows = (row(kinds, flags) for kinds in flags.variants)
  for cells in itertools.chain((head, ['---'] + ['--:'] * (len(head) - 1)),
                               rows):
    print('| ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
  main()
