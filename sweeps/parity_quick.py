"""Parity of 3 to 20 bits, tested to 256: who tracks a state (Grazzi et al.).

  python main.py --mode=sweep --sweep=sweeps/parity_quick.py
  python main.py --mode=report --workdir=runs/parity_quick

Published in 2024, trained on 3 to 40: the delta rule solves it at any length if
beta reaches 2, so that an eigenvalue of its transition may be -1. With beta to
1, softmax and positive diagonal recurrences stay at chance. The paper's size:
sweeps/paper_parity.py.
"""

from configs.grid import product

TASK = dict(
    dataset='task:parity(length=20)', n_layer=1, n_embd=32, n_head=2,
    batch_size=64, learning_rate=3e-3, lr_schedule='constant', weight_decay=0.0,
    use_abs_pos_embeddings=False, max_iters=3000, eval_interval=500,
    log_interval=100, eval_slices=tuple(
        f'(shortest={n // 2}, length={n})' for n in (40, 80, 160, 256)))


def sweep():
  yield from product(**TASK, attention_variant='deltanet',
                     delta_beta_max=[2.0, 1.0], seed=[1, 2, 3])
  yield from product(**TASK, attention_variant=['causal', 'ssm', 'gla'],
                     seed=[1, 2, 3])
