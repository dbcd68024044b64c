"""Softmax, linear attention and Mamba on English text, three seeds each.

  python main.py --mode=sweep --sweep=sweeps/quickstart.py --match=params
  python main.py --mode=report --workdir=runs/quickstart

Hardware: two CPU cores, five minutes of processor time. Expect ssm before
causal before linear, each difference resolved.
"""

from configs.grid import product


def sweep():
  yield from product(
      attention_variant=['causal', 'ssm', 'linear'], seed=[1, 2, 3],
      n_layer=2, max_iters=400, eval_interval=50, log_interval=25)
