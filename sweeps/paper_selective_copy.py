"""Selective copying at the paper's size (Gu & Dao 2023, Mamba, table 1).

  python main.py --mode=sweep --sweep=sweeps/paper_selective_copy.py
  python main.py --mode=report --workdir=runs/paper_selective_copy

Published accuracy at 4,096 tokens with 16 of them to copy: S4 18.3, S6 without
a gate 97.0, Mamba 99.8.

Hardware: an accelerator; 400,000 steps of 64 rows.
"""

from configs.grid import product


def sweep():
  yield from product(
      dataset='task:selective_copy(length=4096)', n_layer=2, n_embd=64,
      batch_size=64, learning_rate=1e-4, lr_schedule='constant',
      weight_decay=0.0, use_abs_pos_embeddings=False, max_iters=400_000,
      eval_interval=10_000, stop_when='accuracy > 0.999',
      attention_variant=['ssm', 'mamba2', 'linear', 'causal'], seed=[1, 2, 3])
