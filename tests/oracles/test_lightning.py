"""The decays of lightning attention against those of MiniMax-01.

Its layer is no retention: q, k and v go through silu and one norm is over all
heads. What is the same is how each head forgets.
"""

import numpy as np
import pytest

from attention import retention

modeling_minimax = pytest.importorskip(
    'transformers.models.minimax.modeling_minimax')

pytestmark = pytest.mark.oracles

LAYERS, HEADS = 8, 4


@pytest.mark.parametrize('layer', [0, 3, 7])
def test_later_layers_forget_less(layer):
  """By the power that docs/variants.md says."""
  config = modeling_minimax.MiniMaxConfig(
      hidden_size=32, num_attention_heads=HEADS, num_hidden_layers=LAYERS)
  theirs = modeling_minimax.MiniMaxLightningAttention(config, layer)
  power = 1 - layer / (LAYERS - 1)
  np.testing.assert_allclose(
      power * retention.log_decays('lightning', HEADS),
      -theirs.get_slope_rate().ravel(), atol=2e-5)
