"""Networks whose features make a Fréchet distance, by name."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qlip.errors import InputError
from qlip.eval.efficientnet import find_efficientnet, load_efficientnet
from qlip.eval.inception import find_inception, load_inception
from qlip.eval.options import FeatureName


class Features(Protocol):
    """A frozen network.

    Attributes:
        name: of the network.
        metric: name of the Fréchet distance of its features; "fid" is the standard Inception's alone.
        num_features: D.
    """

    name: str
    metric: str
    num_features: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 → (B, D) float32."""


def load_features(
    names: Sequence[FeatureName], device: torch.device, inception_weights: Path | None = None
) -> list[Features]:
    """The networks by name; "auto" is every one whose weights are here, which the log says, "none" is none.

    Raises:
        InputError: one that is named has no weights.
    """
    loaders: dict[str, Callable[[], torch.nn.Module]] = {
        "inception": lambda: load_inception(inception_weights),
        "efficientnet-lite0": load_efficientnet,
    }
    asked: list[str] = [name for name in names if name not in ("auto", "none")]
    if unknown := [name for name in asked if name not in loaders]:
        raise InputError(f"features {unknown[0]!r}: choose of auto, none, {', '.join(loaders)}")
    if "auto" in names:
        places = {"inception": inception_weights or find_inception(), "efficientnet-lite0": find_efficientnet()}
        for name, place in places.items():
            logging.getLogger("qlip").info("features of %s: %s", name, place or "no weights, left out")
        asked += [name for name, place in places.items() if place]
    return [loaders[name]().to(device) for name in dict.fromkeys(asked)]  # type: ignore[misc]
