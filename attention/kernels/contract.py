"""What an op and its implementations are, and the gradient around them.

An op is a folder. Its face, `__init__.py`, checks the arguments and makes two
things of them: `Operands`, a NamedTuple of arrays and None, what differs from
call to call; and `Rule`, a hashable NamedTuple, what a program is compiled for.
`reference.py` is its definition. The face's `run(module, rule, operands)` gives
the outputs of an implementation, differentiable. That is a module with

  check(operands, rule)
      raises NotImplementedError for what it cannot do, before any lowering.
  forward(operands, rule) -> (outputs, saved)
      saved: what its backward wants besides the operands.
  backward(operands, rule, saved, cotangents) -> Operands
      the gradients, of any float dtype, None where there is none.
"""

import functools

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(module, rule, operands):
  """The outputs of an implementation, differentiable in its operands."""
  return module.forward(operands, rule)[0]


def _forward(module, rule, operands):
  outputs, saved = module.forward(operands, rule)
  return outputs, (operands, saved)


def _backward(module, rule, residuals, cotangents):
  operands, saved = residuals
  gradients = module.backward(operands, rule, saved, cotangents)
  cast = lambda gradient, operand: (
      None if gradient is None else gradient.astype(operand.dtype))
  return jax.tree.map(
      cast, gradients, operands, is_leaf=lambda x: x is None),


run.defvjp(_forward, _backward)


def check_shape(name, array, **sizes):
  """Raises ValueError unless an argument's shape is that of its letters.

  Args:
    name: the argument's name.
    array: the argument; None passes, for arguments that are optional.
    **sizes: {letter: size} of its axes, in order.
  """
  if array is None or array.shape == tuple(sizes.values()):
    return
  letters = ', '.join(f'{letter}={size}' for letter, size in sizes.items())
  raise ValueError(
      f'{name} has shape {list(array.shape)}: give it [{letters}]')
