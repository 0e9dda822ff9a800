"""Small text-to-image models of random weights."""

from dataclasses import replace

import torch

from qlip.t2i.checkpoint import save
from qlip.t2i.config import SIZES, T2IConfig
from qlip.t2i.model import T2I

SMALL = replace(SIZES["tiny"], hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
BASE = {
    "num_bits": 8,
    "bits": 4,
    "grid": (2, 3),
    "tokenizer": "qlip-tiny",
    "id_hash": "0123456789abcdef",
    "condition": "qlip",
    "condition_width": 12,
    "num_text_tokens": 5,
}
CLASSES = {"condition": "classes", "condition_width": 0, "num_text_tokens": 1, "num_classes": 7}


def small_config(**changes) -> T2IConfig:
    return T2IConfig.of(SMALL, **BASE | changes)


def small_t2i(seed: int = 0, **changes) -> T2I:
    """Weights of about the size of a trained model's, so that tokens and texts matter."""
    torch.manual_seed(seed)
    model = T2I(small_config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name or "table" in name else 0.25)
    return model


def written(folder, tokenizer, **changes):
    """The folder of a random model of qlip-tiny's tokens, after its own tower."""
    shape = {"num_bits": 28, "bits": 7, "grid": (8, 8), "id_hash": tokenizer.id_hash()}
    words = {"condition_width": tokenizer.config.text.hidden_size, "num_text_tokens": 12}
    save(small_t2i(**shape | words | changes), folder)
    return folder
