"""Trains the default job with every variant, and measures each.

  python benchmarks/variants.py
  python benchmarks/variants.py --variants ssm causal,causal,ssm --max_iters 200

Prints a Markdown table: parameters, validation loss over the whole split,
ms a training step, tokens a second of decoding, bytes of decoding state at two
lengths. A variant with commas is an attention_list. Times are of this machine,
one variant after the other; compare them within one run of the script.
"""

import argparse
import statistics
import tempfile
import time

import jax
import numpy as np

import attention
from configs import default
from model import sample
from train_lib import bigram, corpus, cpu, inference, trainer

LENGTHS = (1024, 65536)
DECODED = 256


def config_of(kinds, max_iters):
  """The default config with a variant, or with a list of them."""
  config = default.get_config()
  kinds = tuple(kinds.split(','))
  if len(kinds) > 1:
    config.attention_list = kinds
  else:
    config.attention_variant = kinds[0]
  config.max_iters = max_iters or config.max_iters
  config.log_interval = min(config.log_interval, config.max_iters)
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


def row(kinds, max_iters):
  """The cells of one variant."""
  config = config_of(kinds, max_iters)
  with tempfile.TemporaryDirectory() as workdir:
    history = trainer.train(config, workdir)
    model, _, _ = inference.load(workdir, config)
  constant, per_token = model.state_bytes()
  speed = [r['ms_per_step'] for r in history if 'ms_per_step' in r]
  size = sum(x.size for x in jax.tree.leaves(model))
  return [f'`{kinds.replace(",", " ")}`', f'{size:,}',
          f'{history[-1]["val_loss_full"]:.3f}',
          f'{statistics.median(speed):.1f}', f'{decode_speed(model):,.0f}',
          *(f'{constant + length * per_token:,}' for length in LENGTHS)]


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--variants', nargs='+',
                      default=[*attention.names(), 'causal,causal,ssm'])
  parser.add_argument('--max_iters', type=int, default=0,
                      help='steps; 0: those of the default job')
  flags = parser.parse_args()
  cpu.keep_memory()
  rows = [row(kinds, flags.max_iters) for kinds in flags.variants]
  dataset = corpus.load('pydoc')
  entropy = bigram.entropy(dataset.train)
  print(f'\njax {jax.__version__}, {jax.devices()[0].device_kind}; bigram '
        f'entropy {entropy:.3f}, a table of pairs gives '
        f'{bigram.loss(dataset):.3f}\n')
  head = ['variant', 'parameters', 'validation loss', 'ms/step',
          'decoded tokens/s', *(f'state bytes, T = {n:,}' for n in LENGTHS)]
  for cells in (head, ['---'] + ['--:'] * (len(head) - 1), *rows):
    print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
  main()
