"""No run is bet on a kernel that was not seen to compute right on its device.

Before anything else is compiled, each Pallas kernel that the layers of a config
pick proves itself (attention.kernels.proof). One that does not is avoided:
'auto' takes the next implementation, and the header says why. What has passed
is remembered.

On GPUs the proofs run in a process of their own, started before this one takes
the GPU, with a time limit: a kernel that hangs or crashes is one more that does
not pass. A TPU belongs to one process, where a watchdog says what hangs.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

import attention
from attention import kernels
from attention.kernels import dispatch, proof
from configs import default
from model.layers import segment_positions
from model.sharding import Context

PALLAS = ('tpu', 'gpu')
# Seconds that the proofs of a process may take, with their compilation.
LIMIT = 300
CHILD = (sys.executable, '-m', 'train_lib.kernel_check')
DRIVER = pathlib.Path('/proc/driver/nvidia')


@contextlib.contextmanager
def checked(config):
  """Inside, kernels that do not pass are avoided; yields which, and why.

  Raises:
    ValueError: a kernel that a flag names does not pass.
  """
  failed = {} if config.kernel_check == 'off' else _agreed(_failures(config))
  named = {dict(layer.flags).get('attention_kernel', config.attention_kernel)
           for layer in attention.layers(config)}
  for (op, name), reason in failed.items():
    if name in named:
      raise ValueError(
          f'attention_kernel={name}: the kernel of {op} {reason}; use auto or '
          'xla, or --kernel_check=off to run it all the same')
  with dispatch.avoid(failed):
    yield failed


def proven(mode):
  """A function (config, workdir), run with kernels that pass."""
  @functools.wraps(mode)
  def run(config, workdir=None):
    with checked(config):
      return mode(config, workdir)
  return run


def _failures(config):
  """{(op, implementation): why it is avoided}."""
  if _may_have_gpu():
    device, proofs = _gpus(), _in_child
  elif dispatch.target().platform == 'tpu':
    device, proofs = jax.devices()[0].device_kind, _watched
  else:
    return {}
  passed = _memory(config, device)
  if config.kernel_check == 'auto' and passed.exists():
    return {}
  failed = proofs(config)
  if not failed:
    with contextlib.suppress(OSError):  # Then it is checked again.
      passed.parent.mkdir(parents=True, exist_ok=True)
      passed.touch()
  return failed


def calls(config):
  """The calls of Pallas kernels of training and of decoding, each of them once.

  Of one device and one row: a proof makes batch and heads small anyway.
  """
  T, dtype = config.block_size, jnp.dtype(config.compute_dtype)

  def train(mixer, x):
    def loss(x):
      ids = jnp.zeros(x.shape[:2], jnp.int32) if config.packing else None
      y, _ = mixer(x, Context(_positions(x), ids))
      return y.astype(jnp.float32).sum()
    return jax.grad(loss)(x)

  def decode(mixer, x):
    ctx = Context(_positions(x), jnp.zeros(x.shape[:2], jnp.int32))
    return mixer(x, ctx, mixer.init_state(1, T))[0]

  with dispatch.listen() as heard:
    for layer in dict.fromkeys(attention.layers(config)):
      mixer = jax.eval_shape(
          lambda layer=layer: attention.build(layer, config, rngs=nnx.Rngs(0)))
      for trace, time in ((train, T), (decode, T), (decode, 1)):
        jax.eval_shape(trace, mixer, jax.ShapeDtypeStruct(
            (1, time, config.n_embd), dtype))
  return {repr(c): c for c in heard if c.implementation in PALLAS}.values()


def _positions(x):
  return segment_positions(jnp.zeros(x.shape[:2], jnp.int32))


def _prove(config, failed, before, after):
  """Proves the calls of a config but for those that failed already."""
  for call in calls(config):
    key = call.op, call.implementation
    if key not in failed:
      before(key)
      reason = proof.prove(call)
      if reason:
        failed[key] = f'failed its check on this device ({reason})'
      after(key)
  return failed


def _watched(config):
  """Proves in this process, with a word on what takes long."""
  timers = {}

  def before(key):
    timers[key] = threading.Timer(60, lambda: print(
        f'the kernel check of {key} has taken 60 s: if it hangs, stop it and '
        'use --attention_kernel=xla or --kernel_check=off', file=sys.stderr,
        flush=True))
    timers[key].daemon = True
    timers[key].start()
  return _prove(config, {}, before, lambda key: timers[key].cancel())


def _in_child(config):
  """Proves in processes of their own: one more for each that hangs or dies."""
  failed, values = {}, config.to_dict()
  while True:
    task = json.dumps({'config': values, 'failed': [*map(list, failed)]})
    try:
      done = subprocess.run(
          CHILD, input=task, text=True, capture_output=True, timeout=LIMIT,
          env={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'})
      said, end = done.stdout, f'died (exit status {done.returncode})'
      why = (done.stderr.strip().splitlines() or ['no word'])[-1]
    except subprocess.TimeoutExpired as late:
      said, why = _text(late.stdout), 'no word'
      end = f'did not answer within {LIMIT} s'
    running = None
    for line in said.splitlines():
      word, *rest = json.loads(line)
      if word == 'finished':
        return failed | {(op, name): why for op, name, why in rest}
      running = tuple(rest) if word == 'before' else None
    if running is None:
      raise ValueError(f'the kernel check {end} beside its kernels ({why}): '
                       'use --attention_kernel=xla or --kernel_check=off')
    failed[running] = f'{end} in its check on this device'


def _text(output):
  return output.decode() if isinstance(output, bytes) else output or ''


def child():
  """What CHILD runs: a task from standard input, a line for every event."""
  task = json.load(sys.stdin)
  config = default.get_config()
  config.update({name: tuple(value) if isinstance(value, list) else value
                 for name, value in task['config'].items()})
  tell = lambda *words: print(json.dumps(words), flush=True)
  failed = dict.fromkeys(map(tuple, task['failed']), '')
  found = _prove(config, failed, lambda key: tell('before', *key),
                 lambda key: tell('after', *key))
  tell('finished', *([*key, why] for key, why in found.items() if why))


def _agreed(failed):
  """What failed on any process: all must run the same programs."""
  if jax.process_count() == 1:
    return failed
  from jax.experimental import multihost_utils
  size = 4096
  mine = json.dumps([[*key, why] for key, why in failed.items()]).encode()
  lines = multihost_utils.process_allgather(
      np.frombuffer(mine[:size].ljust(size), np.uint8))
  return {(op, name): why for line in lines
          for op, name, why in json.loads(line.tobytes())}


def _may_have_gpu():
  """Whether JAX may take a GPU of NVIDIA's, without taking it."""
  pretended = dispatch.pretended()
  if pretended:
    return pretended.platform == 'gpu'
  wanted = jax.config.jax_platforms or 'cuda'
  return DRIVER.exists() and ('cuda' in wanted or 'gpu' in wanted)


def _gpus():
  """What the driver says of itself and of the GPUs."""
  return [path.read_text() for path in sorted(
      [DRIVER / 'version', *DRIVER.glob('gpus/*/information')])
          if path.exists()]


def _memory(config, device):
  """The file that says that the kernels of a config have passed here."""
  folder = pathlib.Path(kernels.__file__).parent
  sources = [path.read_text() for path in sorted(folder.rglob('*.py'))]
  flags = {name: config[name] for name in sorted(
      default.model_flags() | {'attention_kernel', 'compute_dtype', 'packing'})}
  key = json.dumps([device, jax.__version__, jaxlib.__version__, flags, sources,
                    sys.version])
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return (pathlib.Path(os.path.expanduser(cache)) / 'attention-lab' / 'kernels'
          / hashlib.sha256(key.encode()).hexdigest()[:32])


if __name__ == '__main__':
  child()
