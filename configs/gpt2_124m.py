"""GPT-2 (124M parameters) as nanoGPT trains it, on a nanoGPT folder.

  python main.py --config=configs/gpt2_124m.py --mesh_fsdp=8

Hardware: eight GPUs with 40 GB or a TPU slice; nanoGPT reports a validation
loss of about 2.85 after four days on 8 A100s. Not run to its end here.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.update(
      dataset='data/openwebtext',  # A folder with train.bin and val.bin.
      n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304,
      bias=False, dropout=0.0, norm_variant='layernorm',
      init_std=0.02,
      compute_dtype='bfloat16', scan_unroll=1, remat='dots',
      batch_size=480, gradient_accumulation_steps=5,
      max_iters=600000, lr_decay_iters=600000, warmup_iters=2000,
      learning_rate=6e-4, min_lr=6e-5, beta1=0.9, beta2=0.95,
      weight_decay=0.1, grad_clip=1.0,
      eval_interval=1000, eval_iters=50, eval_batch_size=96, log_interval=10)
  return config
