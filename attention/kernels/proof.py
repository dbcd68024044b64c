"""Whether an implementation computes on this device what its op means.

Compilers and chips change under a kernel. A proof runs it here, on random
operands of the shapes, dtypes, widths and features of a call but no longer than
need be, forward and backward, beside `xla` in float32, and twice.
"""

import importlib
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

# Sizes that a proof cuts down to, by letter. Of heads, one that is shared most
# is left and those that share it.
LARGEST = {'B': 2, 'T': 2048, 'S': 2048, 'E': 256}

# Largest relative root mean square of the error of an output or a gradient, by
# bytes of the operands' dtype. What is rounded to bfloat16 on its way is
# within a tenth of it, and a wrong mask, decay or head far outside.
TOLERANCE = {2: 3e-2, 4: 1e-3}


def prove(call):
  """Runs a dispatch.Call's implementation, and says what is wrong with it.

  Returns:
    '' or one line: which output, and how far off.
  """
  op = importlib.import_module(call.op)
  ours, xla = (importlib.import_module(f'{call.op}.{name}')
               for name in (call.implementation, 'xla'))
  operands, rule = example(op, call)
  try:
    first, second = (_results(op, ours, rule, operands) for _ in range(2))
  except Exception as error:  # Whatever compilers and drivers raise.
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return f'raises {type(error).__name__}: {reason}'
  wide = jax.tree.map(
      lambda x: x.astype(jnp.float32) if _floating(x) else x, operands)
  with jax.default_matmul_precision('highest'):
    wanted = _results(op, xla, rule, wide)
  tolerance = TOLERANCE[min(
      x.dtype.itemsize for x in jax.tree.leaves(operands) if _floating(x))]
  for name, want in wanted.items():
    off = _error(first[name], want)
    if not off <= tolerance:
      return f'{name} is off by {off:.2g}, more than {tolerance:.2g}'
    if first[name].tobytes() != second[name].tobytes():
      return f'{name} has other bits the second time'
  return ''


def example(op, call):
  """(operands, rule) like those of a call, random and small."""
  letters = {field: _letters(hint) for field, hint in typing.get_type_hints(
      op.Operands).items()}
  sizes = {}
  for field, shape in call.operands._asdict().items():
    if shape is not None:
      sizes |= dict(zip(letters[field], shape.shape))
  small = {x: min(n, LARGEST.get(x, n)) for x, n in sizes.items()}
  heads = {x: sizes[x] for x in 'NKJ' if x in sizes}
  small |= {x: n // min(heads.values()) for x, n in heads.items()}
  rng = np.random.default_rng(0)
  # Documents that end in every block of keys, those of queries in the last.
  long = max(small.get('S', 0), small['T'])
  starts = rng.random((small['B'], long)) < 1 / 200
  ids = np.cumsum(starts, axis=1, dtype=np.int32)
  special = {
      'starts': starts, 'q_ids': ids[:, -small['T']:],
      'kv_ids': ids[:, :small.get('S')],
      'q_offset': np.int32(small.get('S', 0) - small['T'])}

  def value(field, like):
    if like is None:
      return None
    if field in special:
      return jnp.asarray(special[field])
    x = rng.standard_normal([small[x] for x in letters[field]])
    domain = _DOMAIN.get((op.__name__.rsplit('.', 1)[-1], field))
    return jnp.asarray(domain(x) if domain else x, like.dtype)

  operands = op.Operands(**{field: value(field, like) for field, like in
                            call.operands._asdict().items()})
  # What a rule fixes is no operand.
  fixed = {name: int(special[name]) for name in special
           if call.rule._asdict().get(name) is not None}
  return (operands._replace(**dict.fromkeys(fixed)),
          call.rule._replace(**fixed))


# Of operands that are no arbitrary numbers: decay rates and step sizes before
# softplus; logs of decays, and keys as a feature map leaves them, since a
# denominator is a sum of positives.
_DOMAIN = {
    ('scan', 'A'): lambda x: -np.exp(x),
    ('scan', 'dt'): lambda x: x - 2,
    ('chunked', 'decay'): lambda x: -np.exp(x - 2),
    ('chunked', 'q'): lambda x: np.abs(x) + 0.1,
    ('chunked', 'k'): lambda x: np.abs(x) + 0.1,
    ('chunked', 'z0'): np.abs,
}


def _letters(hint):
  """Of an operand's annotation, such as Float[Array, 'B T'] | None."""
  arrays = [t for t in typing.get_args(hint) or (hint,)
            if issubclass(t, jaxtyping.AbstractArray)]
  return arrays[0].dim_str.split() if arrays else []


def _floating(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def _results(op, module, rule, operands):
  """{name: array} of the outputs and of the gradients of what is floating."""
  floating = {field: x for field, x in operands._asdict().items()
              if x is not None and _floating(x)}

  @jax.jit
  def both(floating, operands):
    outputs, pull = jax.vjp(lambda floating: op.run(
        module, rule, operands._replace(**floating)), floating)
    leaves, structure = jax.tree.flatten(outputs)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Not around zero, where sums of cotangents would cancel.
    cotangents = [
        (1 + jax.random.normal(key, y.shape)).astype(y.dtype)
        for key, y in zip(keys, leaves)]
    gradients, = pull(jax.tree.unflatten(structure, cotangents))
    return leaves, gradients

  leaves, gradients = jax.device_get(both(floating, operands))
  return {f'output {i}': np.asarray(y) for i, y in enumerate(leaves)} | {
      f'd{name}': np.asarray(x) for name, x in gradients.items()}


def _error(got, want):
  """Root mean square of the error over that of the wanted values."""
  got, want = (x.astype(np.float64) for x in (got, want))
  size = np.sqrt((want ** 2).sum())
  return np.sqrt(((got - want) ** 2).sum()) / (size or 1.0)
