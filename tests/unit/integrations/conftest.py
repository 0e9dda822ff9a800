"""Small random models of other kinds than qlip-tiny."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import small_config

from qlip.model import QLIP, QuantizerConfig
from qlip.model.image import ImageProcessor


def odd_grids():
    """Patches of 14 as L/14's, a grid that is no square and not the native one, CLIP's legacy end token."""
    tower = replace(small_config().vision, image_size=98, patch_size=14)
    text = replace(small_config().text, eos_token_id=2)
    return small_config(vision=tower, decoder=tower, text=text).at_size((84, 112))


def widest():
    """Tokens of 63 bits, learned positions, plain blocks."""
    quantizer = QuantizerConfig(embed_dim=63, group_size=9)
    tower = replace(small_config().vision, rope=False, swiglu=False, subln=False, hidden_act="quick_gelu")
    return small_config(vision=tower, decoder=tower, quantizer=quantizer)


@pytest.fixture(params=[odd_grids, widest], ids=lambda config: config.__name__)
def other(request):
    config = request.param()
    torch.manual_seed(0)
    return QLIP(config, name="other", image_processor=ImageProcessor(min(config.size), config.size)).eval()
