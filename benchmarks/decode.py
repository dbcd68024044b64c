"""Times sampling with and without the cache, ours and PyTorch's.

  python benchmarks/decode.py
  python benchmarks/decode.py --new_tokens 64 --rounds 20

One sample from a prompt of one token, at the shape of configs/shakespeare_char
(10.7M parameters). `cached` is model.sample.generate; `uncached` is our model
on the whole block for every token, compiled once. The PyTorch row appears where
torch and transformers are installed: their GPT-2, eager, on all tokens so far
for every token, as nanoGPT samples. Of the uncached tokens only every 16th is
drawn, after random ones: their mean time is that of all.

A rate is the best of all rounds, as others may use the machine.
"""

import argparse

import turns

VOCAB = 65
RULE = dict(temperature=0.8, top_k=40)
# Without a cache, a token's time depends on its position alone.
STRIDE = 16


def shape():
  """The config of the shape."""
  from configs import shakespeare_char

  config = shakespeare_char.get_config()
  config.update(vocab_size=VOCAB, dropout=0.0)
  return config


def our_model():
  from flax import nnx

  from model.transformer import Transformer
  from train_lib import cpu

  cpu.keep_memory()
  return Transformer(shape(), rngs=nnx.Rngs(0))


def cached(new_tokens):
  """Returns a function that draws tokens and returns how many."""
  import jax

  from model import sample

  model, key = our_model(), jax.random.key(0)

  def draw():
    chunks = sample.generate(
        model, [[0]], max_new_tokens=new_tokens, key=key, **RULE)
    return sum(chunk.size for chunk in chunks)

  return draw, None


def uncached(new_tokens):
  """The same, without a state."""
  import jax
  import jax.numpy as jnp

  from model import sample

  model = our_model()

  @jax.jit
  def extend(model, tokens, length, key):
    hidden, _ = model.hidden(tokens)  # What follows `length` is not seen.
    logits = model.logits(hidden[:, length - 1])
    return tokens.at[:, length].set(sample.choose(logits, key, **RULE))

  def draw():
    tokens = jnp.zeros((1, model.block_size), jnp.int32)
    lengths = range(STRIDE // 2, new_tokens + 1, STRIDE)
    for length in lengths:
      tokens = extend(model, tokens, length, jax.random.key(length))
    jax.block_until_ready(tokens)
    return len(lengths)

  return draw, None


def torch_uncached(new_tokens):
  """The same of PyTorch's GPT-2."""
  import torch
  import transformers

  config = shape()
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=VOCAB, n_positions=config.block_size, n_embd=config.n_embd,
      n_layer=config.n_layer, n_head=config.n_head, use_cache=False,
      activation_function='gelu_pytorch_tanh', attn_implementation='sdpa',
      bos_token_id=None, eos_token_id=None)).eval()

  tokens = torch.randint(VOCAB, (1, config.block_size))

  @torch.no_grad()
  def draw():
    lengths = range(STRIDE // 2, new_tokens + 1, STRIDE)
    for length in lengths:
      logits = model(tokens[:, :length], logits_to_keep=1).logits[:, -1]
      logits = logits / RULE['temperature']
      least = logits.topk(RULE['top_k']).values[:, -1:]
      logits[logits < least] = -float('inf')
      tokens[:, length] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    return len(lengths)

  return draw, None


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  size = shape().block_size
  parser.add_argument('--new_tokens', type=int, default=size - 1)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--one_core', action='store_true',
                      help='CPU time of one core, for a busy machine')
  flags = parser.parse_args()
  if not STRIDE <= flags.new_tokens < size:
    parser.error(f'--new_tokens must be {STRIDE} to {size - 1}: one block')
  if flags.rounds < 2:
    parser.error('--rounds must be at least 2')
  rivals = {'cached': cached, 'uncached': uncached}
  if turns.torch_is_here():
    rivals['PyTorch uncached'] = torch_uncached
  seconds, _ = turns.measure(
      {name: (make, (flags.new_tokens,)) for name, make in rivals.items()},
      rounds=flags.rounds, one_core=flags.one_core)
  print(f'{flags.new_tokens} tokens after a prompt of one\n{"":18}'
        'ms/token   tokens/s   ratio    quartiles')
  for name, times in seconds.items():
    print(f'{name:18}{1e3 * min(times):8.2f}{1 / min(times):11,.0f} '
          f'{turns.ratio(times, seconds["cached"])}')


if __name__ == '__main__':
  main()
