"""What a checkpoint says of its arrays: names, shapes, types, fingerprints."""

import jax
import jax.numpy as jnp


@jax.jit
def _fingerprint(arrays):
  """{name: uint32} that any change of a single element changes.

  The sum, modulo 2^32, of a hash of every element's bits and place. Integers,
  so that neither the order of summation nor the mesh matters; for each place
  the hash (the finaliser of MurmurHash3) is one to one in the bits.
  """
  def of(x):
    h = jax.lax.bitcast_convert_type(
        x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    h = h ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
  return {name: of(x) for name, x in arrays.items()}


def marks(arrays):
  """The fingerprint of {name: array} as JSON."""
  return {name: int(mark) for name, mark in _fingerprint(arrays).items()}


def shapes(arrays):
  """{name: 'float32[2, 3]'} of {name: array or jax.ShapeDtypeStruct}."""
  return {name: f'{x.dtype}{list(x.shape)}' for name, x in arrays.items()}
