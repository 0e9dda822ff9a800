"""The tokenizer: configuration, layers, quantizer, QLIP, checkpoints, pictures and words."""

from qlip.model.config import PRESETS, ImageTowerConfig, QLIPConfig, QuantizerConfig, TextConfig
from qlip.model.init import InitReport, init_from
from qlip.model.qlip import QLIP, QLIPOutput

__all__ = [
    "PRESETS",
    "QLIP",
    "ImageTowerConfig",
    "InitReport",
    "QLIPConfig",
    "QLIPOutput",
    "QuantizerConfig",
    "TextConfig",
    "init_from",
]
