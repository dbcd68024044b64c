"""A run small enough to be trained in a test."""

import pytest

from configs import default


@pytest.fixture
def corpus(tmp_path):
  path = tmp_path / 'corpus.txt'
  path.write_text(''.join(f'{i} squared is {i * i}.\n' for i in range(600)))
  return str(path)


@pytest.fixture
def config(corpus):
  config = default.get_config()
  config.update(
      dataset=corpus, n_layer=2, n_head=2, n_embd=16, block_size=16,
      batch_size=8, max_iters=6, eval_interval=3, eval_iters=2,
      log_interval=1, warmup_iters=2, dropout=0.1, eval_final=False,
      max_new_tokens=4, mesh_data=1)
  return config
