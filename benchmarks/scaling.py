"""How time and memory of one attention layer grow with the length.

  python benchmarks/scaling.py                    # the table, and a plot
  python benchmarks/scaling.py --variants linear ssm --longest 8192

For T = 512 to 32,768, doubling: milliseconds of forward and backward, the
ratio to the length before, the temporaries of the compiled program, and
milliseconds a token of decoding from a state that holds T tokens. Batch 1,
width 128, 4 heads, float32. A time is the least of its calls, in rounds through
all lengths, as others may use the machine for seconds.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attention
from configs import default
from model.sharding import Context
from train_lib import cpu

SHORTEST = 512
DECODED = 16
SETTINGS = {
    'causal, window 256': dict(
        attention_variant='causal', window_size=256),
    'co4, exact': dict(attention_variant='co4', co4_mode='exact'),
}


def build(name):
  """The mixer of a name, with its flags in SETTINGS."""
  config = default.get_config()
  config.update(SETTINGS.get(name, dict(attention_variant=name)))
  return attention.build(config.attention_variant, config, rngs=nnx.Rngs(0))


def seconds(call, least=0.3):
  """The least time of a few calls."""
  times = []
  while not times or sum(times) < least:
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return min(times)


def train_call(mixer, length):
  """A call that runs forward and backward, and the bytes of temporaries."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, length, 128)).astype(np.float32)
  positions = jnp.arange(length)[None]

  def loss(mixer, x):
    return (mixer(x, Context(positions))[0] ** 2).sum()
  compiled = jax.jit(
      jax.grad(loss, argnums=(0, 1)),
      compiler_options=cpu.compiler_options(jax.devices()[0]),
  ).lower(mixer, x).compile()
  stats = compiled.memory_analysis()
  return functools.partial(compiled, mixer, x), stats.temp_size_in_bytes


def decode_call(mixer, length):
  """A call that decodes DECODED tokens, the last of about `length`."""
  x = jnp.ones((1, 1, 128))

  @jax.jit
  def run(mixer, state):
    def step(state, i):
      position = jnp.full((1, 1), length - DECODED) + i
      y, state = mixer(x, Context(position), state)
      return state, y[0, 0, 0]
    return jax.lax.scan(step, state, jnp.arange(DECODED))[1]
  state = mixer.init_state(1, length)
  # A cache that is all but full: the cost is that of the last tokens.
  full = lambda path, x: (
      jnp.full_like(x, length - DECODED) if 'index' in str(path) else x)
  state = jax.tree_util.tree_map_with_path(full, state)
  return functools.partial(run, mixer, state)


def measure(name, lengths, rounds):
  """Rows of a name: length, ms, MiB, ms of decoding."""
  mixer = build(name)
  training, memory = zip(*(train_call(mixer, length) for length in lengths))
  decoding = [decode_call(mixer, length) for length in lengths]
  calls = [*training, *decoding]
  for call in calls:
    jax.block_until_ready(call())
  least = [math.inf] * len(calls)
  for _ in range(rounds):
    least = list(map(min, least, map(seconds, calls)))
  n = len(lengths)
  return [(length, 1e3 * least[i], memory[i] / 2 ** 20,
           1e3 * least[n + i] / DECODED) for i, length in enumerate(lengths)]


def plot(results, path):
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5))
  titles = ('forward + backward, ms', 'temporaries, MiB',
            'decoding, ms a token')
  for axis, title, index in zip(axes, titles, range(3)):
    for name, rows in results.items():
      axis.loglog([r[0] for r in rows], [r[1 + index] for r in rows],
                  marker='.', label=name)
    axis.set_title(title)
    axis.set_xlabel('T')
  axes[0].legend(fontsize='small')
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  names = [n for n in attention.names() if n != 'identity'] + [*SETTINGS]
  parser.add_argument('--variants', nargs='+', default=names)
  parser.add_argument('--longest', type=int, default=32768)
  parser.add_argument('--rounds', type=int, default=3,
                      help='how often each length is measured')
  parser.add_argument('--plot', default='plots/scaling.png',
                      help='where to write the plot; empty: nowhere')
  flags = parser.parse_args()
  if flags.longest < SHORTEST:
    parser.error(f'--longest must be at least {SHORTEST}')
  if flags.rounds < 1:
    parser.error('--rounds must be at least 1')
  cpu.keep_memory()
  lengths = [SHORTEST]
  while 2 * lengths[-1] <= flags.longest:
    lengths.append(2 * lengths[-1])
  results = {}
  print('| variant | T | forward + backward, ms | ratio | temporaries, MiB '
        '| decoding, ms/token |\n|---|--:|--:|--:|--:|--:|')
  for name in flags.variants:
    results[name] = measure(name, lengths, flags.rounds)
    before = None
    for length, spent, memory, decoding in results[name]:
      ratio = f'{spent / before:.2f}' if before else ''
      print(f'| {name} | {length:,} | {spent:.1f} | {ratio} | {memory:.1f} | '
            f'{decoding:.3f} |', flush=True)
      before = spent
  if flags.plot:
    import pathlib
    pathlib.Path(flags.plot).parent.mkdir(parents=True, exist_ok=True)
    plot(results, flags.plot)
    print(f'\nplot: {flags.plot}')


if __name__ == '__main__':
  main()
