"""Recall against state at the paper's size (Arora et al. 2023, Zoology).

  python main.py --mode=sweep --sweep=sweeps/paper_mqar.py

Published accuracy by bytes of state (the authors' layers have no mlp):
  attention     524k 1.00
  DeltaNet      8.9k 0.79    34k 0.96   134k 1.00
  Gated Delta    17k 0.89    67k 0.99   259k 0.99
  Mamba-2         8k 0.52    16k 0.69    33k 0.79    98k 0.84
  Mamba          16k 0.70    49k 0.76    98k 0.86
  GLA           4.8k 0.53    18k 0.77    68k 0.95
Hardware: an accelerator; 32 epochs of 100,000 rows.
"""

from configs.grid import product


def sweep():
  yield from product(
      dataset='task:mqar(length=256, pairs=16, vocab=8192, rows=100000)',
      n_layer=2, n_embd=[64, 128, 256], n_head=2, batch_size=256,
      learning_rate=[1e-3, 3e-3, 1e-2], weight_decay=0.1, min_lr=0.0,
      use_abs_pos_embeddings=False, max_iters=12_500, eval_interval=391,
      stop_when='accuracy > 0.99',
      eval_slices=('(length=256, pairs=4)', '(length=256, pairs=8)',
                   '(length=256, pairs=32)', '(length=512, pairs=64)'),
      attention_variant=['causal', 'deltanet', 'gated_deltanet', 'mamba2',
                         'ssm', 'gla', 'linear'], seed=[1, 2, 3])
