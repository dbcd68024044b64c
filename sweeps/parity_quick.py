"""Which mixers count: parity, from 3 to 40 bits to 256 (Grazzi et al. 2024).

  python main.py --mode=sweep --sweep=sweeps/parity_quick.py
  python main.py --mode=report --workdir=runs/parity_quick

Hardware: two CPU cores, a quarter of an hour. Expect a layer of the delta rule
to count where a step may reflect (beta to 2), and no other to.
"""

from configs.grid import product


def sweep():
  yield from product(
      attention_list=[('deltanet(delta_beta_max=2)',), ('deltanet',),
                      ('causal',), ('mamba2',), ('ssm',), ('linear',)],
      seed=[1, 2, 3], dataset='task:parity', n_layer=1, n_head=2, n_embd=32,
      use_abs_pos_embeddings=False, batch_size=64, learning_rate=3e-3,
      max_iters=1000, eval_interval=100, log_interval=50,
      eval_slices=('(shortest=40, length=256)',))
