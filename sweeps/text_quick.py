"""Every mixer on English text, three seeds, 400 steps each.

  python main.py --mode=sweep --sweep=sweeps/text_quick.py --match=params
  python main.py --mode=report --workdir=runs/text_quick

Another text: --dataset=FILE --workdir=runs/ANOTHER. Rotary positions beside the
learned ones where a mixer has the flag.
"""

import attention
from configs.grid import product


def sweep():
  for name in attention.names():
    rotary = 'use_rotary_embeddings' in attention.flags(name)
    yield from product(
        **dict(use_rotary_embeddings=True) if rotary else {},
        attention_variant=name, n_layer=2, max_iters=400, eval_interval=100,
        log_interval=50, seed=[1, 2, 3])
