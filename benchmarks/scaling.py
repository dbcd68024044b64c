"""How time and memory of one attention layer grow with the length.

  python benchmarks/scaling.py                    # the table, and a plot
  python benchmarks/scaling.py --variants linear ssm --longest 8192

For T = 512 to 32,768, doubling: milliseconds of forward and backward, the
ratio to the length before, the temporaries of the compiled program, and
milliseconds a token of decoding from a state that holds T tokens. Batch 1,
width 128, 4 heads, float32.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attention
from configs import default
from model.layers import Context
from train_lib import metrics

SHORTEST = 512
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


def seconds(fn, *args, least=0.4):
  """The least time of a few calls."""
  jax.block_until_ready(fn(*args))
  times, spent = [], 0.0
  while spent < least or len(times) < 2:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    times.append(time.perf_counter() - start)
    spent += times[-1]
  return min(times)


def train_cost(mixer, length):
  """(seconds forward and backward, bytes of temporaries)."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, length, 128)).astype(np.float32)
  positions = jnp.arange(length)[None]

  def loss(mixer, x):
    return (mixer(x, Context(positions))[0] ** 2).sum()
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(mixer, x).compile()
  stats = compiled.memory_analysis()
  return seconds(compiled, mixer, x), stats.temp_size_in_bytes


def decode_cost(mixer, length):
  """Seconds a token, from a state that holds about `length` tokens."""
  x = jnp.ones((1, 1, 128))
  steps = 16

  @jax.jit
  def run(mixer, state):
    def step(state, i):
      position = jnp.full((1, 1), length - steps) + i
      y, state = mixer(x, Context(position), state)
      return state, y[0, 0, 0]
    return jax.lax.scan(step, state, jnp.arange(steps))[1]
  state = mixer.init_state(1, length)
  # A cache that is all but full: the cost is that of the last tokens.
  full = lambda path, x: (
      jnp.full_like(x, length - steps) if 'index' in str(path) else x)
  state = jax.tree_util.tree_map_with_path(full, state)
  return seconds(run, mixer, state) / steps


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
  parser.add_argument('--plot', default='plots/scaling.png',
                      help='where to write the plot; empty: nowhere')
  flags = parser.parse_args()
  metrics.keep_memory()
  results = {}
  print('| variant | T | forward + backward, ms | ratio | temporaries, MiB '
        '| decoding, ms/token |\n|---|--:|--:|--:|--:|--:|')
  for name in flags.variants:
    mixer, before, rows = build(name), None, []
    length = SHORTEST
    while length <= flags.longest:
      spent, memory = train_cost(mixer, length)
      decoding = decode_cost(mixer, length)
      ratio = f'{spent / before:.2f}' if before else ''
      print(f'| {name} | {length:,} | {1e3 * spent:.1f} | {ratio} | '
            f'{memory / 2 ** 20:.1f} | {1e3 * decoding:.3f} |', flush=True)
      rows.append((length, 1e3 * spent, memory / 2 ** 20, 1e3 * decoding))
      before, length = spent, 2 * length
    results[name] = rows
  if flags.plot:
    import pathlib
    pathlib.Path(flags.plot).parent.mkdir(parents=True, exist_ok=True)
    plot(results, flags.plot)
    print(f'\nplot: {flags.plot}')


if __name__ == '__main__':
  main()
