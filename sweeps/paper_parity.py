"""Parity at the paper's size (Grazzi et al. 2024, arXiv 2411.12537).

  python main.py --mode=sweep --sweep=sweeps/paper_parity.py
  python main.py --mode=report --workdir=runs/paper_parity

Trained on 3 to 40 bits, tested on 40 to 256. Published accuracy above chance,
scaled to 1: DeltaNet 0.02 with beta to 1 and 1.00 with beta to 2; softmax 0.02.

Hardware: an accelerator; 20,000 steps of 256 rows.
"""

from configs.grid import product

TASK = dict(
    dataset='task:parity', n_layer=2, n_embd=128, n_head=4, batch_size=256,
    learning_rate=1e-3, min_lr=1e-6, warmup_iters=2000, weight_decay=0.0,
    use_abs_pos_embeddings=False, max_iters=20_000, eval_interval=1000,
    eval_slices=('(shortest=40, length=256)',))


def sweep():
  yield from product(
      **TASK, attention_variant=['deltanet', 'gated_deltanet'],
      delta_beta_max=[1.0, 2.0], seed=[1, 2, 3])
  yield from product(**TASK, attention_variant=['causal', 'ssm', 'mamba2'],
                     seed=[1, 2, 3])
