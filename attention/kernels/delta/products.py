"""The products of the chunks of `delta.xla`, and their gradients.

With `packed`, documents are kept apart: what is not finite in one does not
reach another, not in a sum over steps and not by 0 * inf.
"""

import functools

import jax
import jax.numpy as jnp

__all__ = ['finite', 'inverse', 'mix', 'multiply', 'pair', 'product']


def finite(packed, x):
  """x, with documents in a row zero where it is not finite."""
  return jnp.where(jnp.isfinite(x), x, 0.0) if packed else x


def multiply(form, a, b, *, precision=None):
  """A batched product: 'a b', 'a b^T' or 'a^T b'.

  As in `chunked.xla`: on a CPU a product over the rows of a is slow, unless a
  is transposed first. Few axes, for what `delta.xla` says of them.

  Args:
    form: which one.
    a, b: arrays [...,rows,columns] of the same batch.
    precision: of jnp.matmul; what sums or inverts must not round its inputs.
  """
  *batch, _, _ = a.shape
  a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
  if form == 'a^T b':
    a = jax.lax.optimization_barrier(a.swapaxes(-1, -2))
  elif form == 'a b^T':
    b = b.swapaxes(-1, -2)
  c = jnp.matmul(a, b, precision=precision)
  return c.reshape(*batch, *c.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix(packed, weights, b):
  """Sums of the steps of b, weighted; what is not finite counts as zero."""
  return product('a b', weights, finite(packed, b))


def _mix_forward(packed, weights, b):
  return mix(packed, weights, b), (weights, b)


def _mix_backward(packed, operands, dc):
  weights, b = operands
  return (product('a b^T', dc, b),
          product('a^T b', weights, finite(packed, dc)))


mix.defvjp(_mix_forward, _mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pair(packed, a, b):
  """Products of the steps of a with those of b."""
  del packed  # What is not finite stays with its pair; not so in gradients.
  return product('a b^T', a, b)


def _pair_forward(packed, a, b):
  return pair(packed, a, b), (a, b)


def _pair_backward(packed, operands, dc):
  a, b = (finite(packed, x) for x in operands)
  return product('a b', dc, b), product('a^T b', dc, a)


pair.defvjp(_pair_forward, _pair_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(form, a, b):
  """`multiply`, whose gradients are such products."""
  return multiply(form, a, b)


def _product_forward(form, a, b):
  return product(form, a, b), (a, b)


def _product_backward(form, operands, dc):
  a, b = operands
  if form == 'a b':
    return product('a b^T', dc, b), product('a^T b', a, dc)
  if form == 'a b^T':
    return product('a b', dc, b), product('a^T b', dc, a)
  return product('a b^T', b, dc), product('a b', a, dc)


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def inverse(packed, A, same):
  """(I + A)^-1 of A [X,n,T,S], strictly lower triangular.

  By halves: [[P, 0], [R, Q]]^-1 = [[P', 0], [-Q' R P', Q']]. No power of A is
  made, so that nothing grows beyond the inverse of some of its blocks.

  Args:
    packed: whether documents are to be kept apart.
    A: zero where two steps are of different ones.
    same: where they are of the same one.
  """
  size = A.shape[-1]
  step, half = jnp.arange(size), 1
  inverted = jnp.broadcast_to(jnp.eye(size), A.shape)
  while half < size:
    block, second = step // (2 * half), step // half % 2 == 1
    corner = (block[:, None] == block) & second[:, None] & ~second
    R = jnp.where(corner, A, 0.0)
    if half > 1:
      R = _apart(packed, _exactly('a b', R, inverted), same)
      R = _apart(packed, _exactly('a b', inverted, R), same)
    inverted = inverted - R
    half *= 2
  return inverted


def _inverse_forward(packed, A, same):
  inverted = inverse(packed, A, same)
  return inverted, (inverted, same)


def _inverse_backward(packed, residuals, dinverted):
  inverted, same = residuals
  dinverted = _apart(packed, dinverted, same)
  dA = _apart(packed, _exactly('a^T b', inverted, dinverted), same)
  dA = _exactly('a b^T', dA, inverted)
  return -jnp.tril(_apart(packed, dA, same), -1), None


inverse.defvjp(_inverse_forward, _inverse_backward)


_exactly = functools.partial(multiply, precision='highest')


def _apart(packed, pairs, same):
  return jnp.where(same, pairs, 0.0) if packed else pairs
