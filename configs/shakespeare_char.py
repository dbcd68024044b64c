"""nanoGPT's character model for one GPU: 10.7M parameters, 5,000 steps.

  python main.py --config=configs/shakespeare_char.py

Hardware: one GPU; nanoGPT reports a best validation loss of 1.4697, three
minutes on an A100. Not run to its end here: no GPU was at hand.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.update(
      dataset='shakespeare_char', tokenizer='char',
      n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2,
      norm_variant='layernorm', init_std=0.02,
      batch_size=64, max_iters=5000, lr_decay_iters=5000,
      learning_rate=1e-3, min_lr=1e-4, warmup_iters=100,
      beta2=0.99, weight_decay=0.1, grad_clip=1.0,
      eval_interval=250, eval_iters=200, log_interval=50)
  return config
