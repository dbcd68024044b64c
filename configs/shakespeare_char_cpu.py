"""nanoGPT's character model for a CPU: 0.8M parameters, 2,000 steps.

  python main.py --config=configs/shakespeare_char_cpu.py

Hardware: two CPU cores. Validation loss: 1.76, of nanoGPT 1.88. The difference
is the wider initialisation: with --init_std=0.02, nanoGPT's, it is 1.90 (three
seeds: 1.898, 1.902, 1.915). Time: two minutes.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.update(
      dataset='shakespeare_char', tokenizer='char',
      n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0,
      norm_variant='layernorm',
      batch_size=12, max_iters=2000, lr_decay_iters=2000,
      learning_rate=1e-3, min_lr=1e-4, warmup_iters=100,
      beta2=0.99, weight_decay=0.1, grad_clip=1.0,
      eval_interval=250, eval_iters=20, log_interval=50)
  return config
