from dataclasses import replace

import pytest
import torch
from tests.conftest import small_config

from qlip.model.config import PRESETS
from qlip.train.flops import flops_per_image, peak_flops


def tower(config, tokens):
    """Operations of a tower's forward pass, by hand: weights once a token, and attention's two products."""
    width, mlp = config.hidden_size, config.intermediate_size
    weights = 4 * width**2 + (3 if config.swiglu else 2) * width * mlp
    return config.num_hidden_layers * (2 * tokens * weights + 4 * tokens**2 * width)


def by_hand(config, text_length, frozen):
    """Forward once and backward twice, but for gradients with respect to what is not trained."""
    vision, decoder, text = config.vision, config.decoder, config.text
    tokens, bits, dim = config.num_tokens, config.num_bits, config.projection_dim
    patches = 2 * tokens * 3 * vision.patch_size**2 * vision.hidden_size
    encoder = tower(vision, tokens + 1)
    down = 2 * tokens * vision.hidden_size**2, 2 * tokens * vision.hidden_size * bits
    up = 2 * tokens * (bits * decoder.hidden_size + decoder.hidden_size**2)
    pixels = 2 * tokens * decoder.intermediate_size * (decoder.hidden_size + 3 * decoder.patch_size**2)
    rest = 3 * (down[1] + up + tower(decoder, tokens) + pixels)
    if frozen:
        return patches + encoder + 2 * down[0] + rest
    words = 3 * (tower(text, text_length) + 2 * text.hidden_size * dim) if text_length else 0
    project = 3 * 2 * vision.hidden_size * dim if text_length else 0
    return 2 * patches + 3 * (encoder + down[0]) + rest + words + project


@pytest.mark.parametrize("name", ["b16-256", "tiny"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_count_is_that_of_a_formula(name, frozen):
    config = PRESETS[name]
    length = 0 if frozen else config.text.max_position_embeddings
    counted = flops_per_image(config, length, frozen_encoder=frozen)
    assert counted == pytest.approx(by_hand(config, length, frozen), rel=1e-6)


def test_what_is_left_out_costs_nothing():
    config = small_config()
    whole = flops_per_image(config, 16)
    assert flops_per_image(config) < whole and flops_per_image(config, 8) < whole
    without, half = (flops_per_image(config, 16, rebuilt=share) for share in (0.0, 0.5))
    assert without < half < whole and whole - half == pytest.approx(half - without)
    deeper = replace(config, decoder=replace(config.decoder, num_hidden_layers=4))
    assert flops_per_image(deeper, 16, rebuilt=0.0) == without


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_of_a_gpu_goes_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda") == peak


def test_a_cpu_has_no_known_peak():
    assert peak_flops("cpu") is None
