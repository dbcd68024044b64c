"""Induction heads, trained at 64 tokens and tested to 1,024 (Mamba, table 11).

  python main.py --mode=sweep --sweep=sweeps/induction_quick.py
  python main.py --mode=report --workdir=runs/induction_quick

Published, trained at 256: Mamba 100% to 2^20; rotary softmax 83.6% at 2x, 31.3%
at 4x, 8.6% at 16x. The paper's size: sweeps/paper_induction.py.
"""

from configs.grid import product

TASK = dict(
    dataset='task:induction(length=64)', n_layer=2, n_embd=64, batch_size=32,
    learning_rate=1e-3, lr_schedule='constant', weight_decay=0.0,
    use_abs_pos_embeddings=False, eval_iters=5, eval_interval=500,
    log_interval=100, eval_slices=tuple(
        f'length={n}' for n in (128, 256, 512, 1024)))


def sweep():
  yield from product(**TASK, attention_variant='ssm', max_iters=1000,
                     ssm_inner_norm=[False, True], seed=[1, 2, 3])
  yield from product(**TASK, attention_variant='causal', max_iters=3000,
                     use_rotary_embeddings=True, seed=[1, 2, 3])
