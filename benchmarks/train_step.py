"""Times a training step of the presets' shapes, ours and PyTorch's.

  python benchmarks/train_step.py
  python benchmarks/train_step.py --shapes shakespeare_char_cpu --rounds 100

Ours is the step of train_lib.trainer on a run as main.py opens it. The
PyTorch row appears where torch and transformers are installed: their GPT-2,
eager, with scaled_dot_product_attention and the fused gelu, then clipping and
AdamW as nanoGPT sets it up on CPU. Its dense layers and norms have biases, as
GPT-2's do: --bias adds them here.

A time is the least of all rounds, as others may use the machine; the quartiles
of the rounds' ratios tell how far to trust the ratio of the two.
"""

import argparse
import importlib
import pathlib
import string
import tempfile

import numpy as np
import turns

# name: (what differs from its preset, steps of a round)
SHAPES = {
    'shakespeare_char_cpu': (dict(), 5),
    'shakespeare_char': (dict(batch_size=8, dropout=0.0), 1),
}
# As many characters as Tiny Shakespeare has.
CHARACTERS = string.ascii_letters + string.digits + ' .\n'


def preset(shape, bias=False):
  """The config of a shape."""
  config = importlib.import_module(f'configs.{shape}').get_config()
  config.update(SHAPES[shape][0], bias=bias)
  return config


def our_step(shape, bias):
  """Returns a function that takes steps, and the number of parameters."""
  import jax

  from train_lib import cpu, trainer
  from train_lib import run as run_lib

  cpu.keep_memory()
  config = preset(shape, bias)
  with tempfile.TemporaryDirectory() as folder:
    rng = np.random.default_rng(0)
    path = pathlib.Path(folder, 'characters.txt')
    path.write_text(''.join(rng.choice(list(CHARACTERS), 1 << 17)))
    config.update(dataset=str(path), tokenizer='char')
    run = run_lib.open_run(config, pathlib.Path(folder, 'run'))
  state = run.init_state()
  step = trainer.make_step(run).lower(
      state, run.batch(0), run.constants).compile()
  count, index = SHAPES[shape][1], 0

  def steps():
    nonlocal state, index
    for _ in range(count):
      state, values = step(state, run.batch(index), run.constants)
      index += 1
    jax.block_until_ready((state, values))
    return count

  return steps, run.model.n_params()


def torch_step(shape):
  """The same of PyTorch's GPT-2."""
  import torch
  import transformers

  config, (_, count) = preset(shape), SHAPES[shape]
  T = config.block_size
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=len(CHARACTERS), n_positions=T, n_embd=config.n_embd,
      n_layer=config.n_layer, n_head=config.n_head, use_cache=False,
      activation_function='gelu_pytorch_tanh', attn_implementation='sdpa',
      embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
      bos_token_id=None, eos_token_id=None))
  model.train()
  parameters = list(model.parameters())
  optimizer = torch.optim.AdamW(
      [dict(params=[p for p in parameters if p.ndim > 1],
            weight_decay=config.weight_decay),
       dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)],
      lr=config.learning_rate, betas=(config.beta1, config.beta2))
  text = torch.randint(len(CHARACTERS), (1 << 17,))

  def steps():
    for _ in range(count):
      starts = torch.randint(len(text) - T, (config.batch_size,))
      rows = torch.stack([text[s:s + T + 1] for s in starts])
      logits = model(rows[:, :-1]).logits
      loss = torch.nn.functional.cross_entropy(
          logits.flatten(0, 1), rows[:, 1:].flatten())
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
      optimizer.step()
    return count

  return steps, sum(p.numel() for p in parameters)


def table(shape, *, rounds, bias, one_core):
  """Prints the times of one shape."""
  rivals = {'ours': (our_step, (shape, bias))}
  if turns.torch_is_here():
    rivals['PyTorch'] = torch_step, (shape,)
  seconds, sizes = turns.measure(rivals, rounds=rounds, one_core=one_core)
  config = preset(shape)
  tokens = config.batch_size * config.block_size
  print(f'\n{shape}: {config.n_layer} layers, {config.n_head} heads, width '
        f'{config.n_embd}, block {config.block_size}, batch '
        f'{config.batch_size}, {config.compute_dtype}\n{"":10}'
        '  parameters   ms/step   tokens/s   ratio    quartiles')
  for name, times in seconds.items():
    print(f'{name:10}{sizes[name]:12,}{1e3 * min(times):10.1f}'
          f'{tokens / min(times):11,.0f} {turns.ratio(times, seconds["ours"])}',
          flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--shapes', nargs='+', choices=SHAPES, default=[*SHAPES])
  parser.add_argument('--rounds', type=int, default=40)
  parser.add_argument('--bias', action='store_true',
                      help='biases here too, as GPT-2 has them')
  parser.add_argument('--one_core', action='store_true',
                      help='CPU time of one core, for a busy machine')
  flags = parser.parse_args()
  if flags.rounds < 2:
    parser.error('--rounds must be at least 2')
  for shape in flags.shapes:
    table(shape, rounds=flags.rounds, bias=flags.bias,
          one_core=flags.one_core)


if __name__ == '__main__':
  main()
