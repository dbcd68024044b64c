"""Selective copying at 256 tokens (Mamba, table 1).

  python main.py --mode=sweep --sweep=sweeps/selective_copy_quick.py
  python main.py --mode=report --workdir=runs/selective_copy_quick

Published, at 4,096 tokens: Mamba 99.8%, the same without selection (S4) 18.3%.
Paper's size: sweeps/paper_selective_copy.py.
"""

from configs.grid import product

TASK = dict(
    dataset='task:selective_copy', n_layer=2, n_embd=64, n_head=2,
    batch_size=16, learning_rate=3e-3, weight_decay=0.0,
    use_abs_pos_embeddings=False, max_iters=2000, eval_interval=500,
    log_interval=100, stop_when='accuracy > 0.99')


def sweep():
  yield from product(**TASK, attention_variant=['ssm', 'linear'],
                     seed=[1, 2, 3])
