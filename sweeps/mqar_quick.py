"""Multi-query recall of 4 pairs, every mixer (Arora et al. 2023, Zoology).

  python main.py --mode=sweep --sweep=sweeps/mqar_quick.py
  python main.py --mode=report --workdir=runs/mqar_quick

Published, at equal state: softmax 1.0, the delta rule above Mamba-2, linear
attention last. The paper's size: sweeps/paper_mqar.py.
"""

import attention
from configs.grid import product

TASK = dict(
    dataset='task:mqar(length=32, pairs=4, vocab=32)', n_layer=2,
    n_embd=64, n_head=2, batch_size=64, learning_rate=3e-3, weight_decay=0.0,
    use_abs_pos_embeddings=False, max_iters=1500, eval_interval=250,
    eval_iters=10, log_interval=50, stop_when='accuracy > 0.99',
    eval_slices=('pairs=2', 'pairs=8'))


def sweep():
  for name in attention.names():
    rotary = 'use_rotary_embeddings' in attention.flags(name)
    yield from product(
        **TASK, **dict(use_rotary_embeddings=True) if rotary else {},
        attention_variant=name, seed=[1, 2, 3])
