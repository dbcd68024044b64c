"""Chunked linear attention: what ones give, spans of decays, its errors.

What all implementations promise is in test_contract.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels import chunked, dispatch, proof
from attention.kernels.chunked.gpu import chunk
from attention.kernels.chunked.tpu import blocks
from tests.kernels import implementations, ops
from tests.kernels.measure import largest_buffer
from tests.kernels.ops import Chunked


def test_values_of_one_give_one(capfd):
  row = Chunked(T=100, has='starts', normalize=1e-6)
  operands = row.arguments(jnp.float32)
  operands['v'] = jnp.ones_like(operands['v'])
  y = implementations.outputs(row, 'xla', operands, capfd)['y']
  np.testing.assert_allclose(y, 1.0, rtol=1e-5)


def test_heads_that_share_a_state_take_several_programs():
  """In the row of the contract that has four and room for two."""
  sizes = functools.partial(blocks.sizes, chunk=32)
  assert sizes(100, 4, widest=8, itemsize=4, rows=128).heads == 2


def test_shared_heads_are_never_repeated():
  row = Chunked(B=1, T=4096, N=8, K=8, H=64, V=4, shared='q k', has='decay')
  run = functools.partial(ops.run, ops.function(Chunked, functools.partial(
      row.op, implementation='xla'), {}))
  program = jax.jit(run).lower(
      row.arguments(jnp.float32), row.cotangents()).compile()
  assert largest_buffer(program) <= row.T * row.H


def test_a_proof_keeps_what_heads_share():
  """Of two groups of Mamba-2, one and its three heads."""
  row = Chunked(N=6, K=6, J=2, shared='q k', has='decay')
  with dispatch.listen() as calls:
    chunked.chunked_linear_attention(**row.arguments(jnp.float32))
  operands, _ = proof.example(chunked, calls[0])
  heads = {name: x.shape[2] for name, x in operands._asdict().items()
           if name in ('q', 'k', 'v', 'decay')}
  assert heads == dict(q=1, k=1, v=3, decay=3)


def test_spans_are_sums_over_exactly_their_steps():
  random = np.random.default_rng(0)
  logs = -np.exp(random.normal(size=64) * 4).astype(np.float32)
  levels, before, after = map(np.asarray, jax.jit(chunk.spans)(logs))
  exact = logs.astype(np.float64)
  for t in range(64):
    np.testing.assert_allclose(before[t], exact[:t + 1].sum(), rtol=1e-6)
    np.testing.assert_allclose(after[t], exact[t + 1:].sum(), rtol=1e-6)
    level = [(s ^ t).bit_length() - 1 for s in range(t)]
    np.testing.assert_allclose(
        levels[level, np.arange(t)] + levels[level, t],
        [exact[s + 1:t + 1].sum() for s in range(t)], rtol=1e-6)


@pytest.mark.parametrize('change, message', [
    (dict(q=jnp.bfloat16), 'the same for all'),
    (dict(q=jnp.float16, k=jnp.float16, v=jnp.float16), 'float16'),
    (dict(width=272), '272'),
], ids=['dtypes', 'dtype', 'width'])
def test_tpu_declines(change, message, on_tpu):
  shape = 1, 64, 1, change.get('width', 16)
  q, k, v = (jax.ShapeDtypeStruct(shape, change.get(name, jnp.float32))
             for name in 'qkv')
  attend = functools.partial(
      chunked.chunked_linear_attention, implementation='tpu')
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attend, q, k, v)


@pytest.mark.parametrize('change, reason', [
    (dict(q=jnp.float32), 'not float32'),
    (dict(v=jnp.float16), 'no float16'),
    (dict(V=24), 'V that 16 divides'), (dict(H=144), 'up to 128'),
], ids=['float32', 'float16', 'narrow', 'wide'])
def test_gpu_declines(change, reason, on_h100):
  sizes = {'H': 16, 'V': 16} | {n: x for n, x in change.items() if n in 'HV'}
  arguments = Chunked(T=10, **sizes).arguments(jnp.bfloat16)
  for name in set(change) - set(sizes):
    arguments[name] = arguments[name].astype(change[name])
  with pytest.raises(NotImplementedError, match=reason):
    chunked.chunked_linear_attention(**arguments, implementation='gpu')


@pytest.mark.parametrize('change, message', [
    (dict(k=jnp.zeros((2, 10, 3, 8)), v=jnp.zeros((2, 10, 3, 6))),
     'q has 4 heads, no multiple of the 3 of v'),
    (dict(k=jnp.zeros((2, 10, 3, 8))),
     'v has 2 heads, no multiple of the 3 of k'),
    (dict(q=jnp.zeros((2, 10, 2, 8)), k=jnp.zeros((2, 10, 1, 8)),
          v=jnp.zeros((2, 10, 4, 6))), 'q has 2 heads.* nor as few as share'),
    (dict(decay=jnp.zeros(4)), r'decay has shape \[4\].*K=2'),
    (dict(s0=jnp.zeros((2, 2, 8, 6)), normalize=1e-6), 'give the pair'),
    (dict(normalize=0.0), 'must be positive'),
    (dict(s0=jnp.zeros((2, 2, 6, 8))), r's0 has shape .*H=8, V=6'),
    (dict(implementation='cuda'), 'unknown implementation'),
], ids=['heads', 'keys', 'queries', 'decay', 'pair', 'eps', 's0',
        'implementation'])
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match=message):
    chunked.chunked_linear_attention(
        **(Chunked(T=10).arguments(jnp.float32) | change))
