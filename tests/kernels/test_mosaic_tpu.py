"""The dialect of the TPU kernels, by itself."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import mosaic_tpu


@pytest.mark.parametrize('distance, order', [
    (1, 'a0 b0 a1 c0 b1 a2 c1 b2 c2'), (2, 'a0 a1 b0 a2 b1 c0 b2 c1 c2'),
    (9, 'a0 a1 a2 b0 b1 b2 c0 c1 c2')])
def test_stages_of_a_pipeline_wait_for_each_other(distance, order):
  done = []

  def stage(name):
    def run(item, *made):
      assert made == ((item, chr(ord(name) - 1)) if name > 'a' else ())
      done.append(f'{name}{item}')
      return item, name
    return run

  mosaic_tpu.pipeline(
      range(3), [stage(name) for name in 'abc'], distance=distance)
  assert done == order.split()


class Rows(mosaic_tpu.Launch):
  """Cuts the rows of an array in blocks of 8."""
  plan = 3.0

  def __init__(self, rows):
    n_blocks = -(-rows // 8)
    self.grid = 1, 1, n_blocks
    self.axes = dict(block=(n_blocks, None), rows=(n_blocks * 8, 8))

  def place(self, b, p, i):
    return dict(block=i, rows=i)


def test_kernels_get_refs_by_name_and_blocks_by_axis():
  def kernel(ref, plan):
    assert ref.bias is None and ref.product is None
    ref.kept[...] = ref.x[...] * plan
    ref.y[...] = ref.kept[...]
    ref.total[...] = jnp.sum(ref.kept[...], axis=0, keepdims=True)

  x = np.arange(20 * 128, dtype=np.float32).reshape(20, 128)
  call = Rows(20)
  rows, total = call.layout('rows', 128), call.layout('block', 1, 128)
  with pltpu.force_tpu_interpret_mode():
    out = call.run(
        kernel, name='thrice', operands=dict(x=rows.of(x), bias=rows.of(None)),
        outputs=dict(y=rows.out(), product=None, total=total.out()),
        scratch=dict(kept=(8, 128), unused=None), flops=0, transcendentals=0)
  assert out.product is None
  np.testing.assert_array_equal(out.y[:20], 3 * x)
  np.testing.assert_array_equal(out.y[20:], 0)
  np.testing.assert_array_equal(
      out.total[2, 0], 3 * x[16:].sum(0))
