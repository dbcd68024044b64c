"""Induction heads at the paper's size (Gu & Dao 2023, Mamba, table 11).

  python main.py --mode=sweep --sweep=sweeps/paper_induction.py
  python main.py --mode=report --workdir=runs/paper_induction

Published accuracy, trained at 2^8 tokens:

                    2^9    2^10   2^11   2^12   2^14
  absolute          58.6   26.6   18.8    9.8    7.8
  RoPE              83.6   31.3   18.4    8.6    5.5
  Mamba            100    100    100    100    100

Hardware: an accelerator; 204,800 steps of 8 rows.
"""

from configs.grid import product

TASK = dict(
    dataset='task:induction', n_layer=2, batch_size=8, weight_decay=0.0,
    lr_schedule='constant', use_abs_pos_embeddings=False, max_iters=204_800,
    eval_interval=8192, eval_slices=tuple(
        f'length={2 ** n}' for n in (9, 10, 11, 12, 14)))


def sweep():
  yield from product(**TASK, attention_variant='ssm', n_embd=64,
                     ssm_inner_norm=False, learning_rate=1e-3, seed=[1, 2, 3])
  yield from product(
      **TASK, attention_variant='causal', n_embd=128, n_head=8,
      use_rotary_embeddings=True, learning_rate=[2e-4, 1e-3], seed=[1, 2, 3])
