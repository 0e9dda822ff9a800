"""The Inception network of the standard FID, through `torch-fidelity`: the one file that imports it.

Its weights, converted from TensorFlow's graph of 2015, lie where a person has put them; any run of torch-fidelity
or pytorch-fid leaves them in torch.hub's folder. They are known by their hash, so that what is called FID is FID.
"""

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip.errors import InputError, MissingExtra, one_line

FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
HASH = "6726825d"  # the first digits of SHA-256, as in the names


class Inception(nn.Module):
    """Features of the last pooling layer, after TensorFlow's own resize to 299 × 299."""

    name = "inception"
    metric = "fid"
    num_features = 2048

    def __init__(self, path: Path):
        """Load the network.

        Raises:
            InputError: torch-fidelity is not installed, or the file holds other weights.
        """
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingExtra(
                f"FID needs torch-fidelity ({one_line(error)}): pip install 'open-qlip[pretrained-metrics]'"
            ) from error
        _check(path)
        self.network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 → (B, 2048) float32."""
        return self.network(pictures.to(next(self.network.parameters()).device))[0]


def load_inception(path: str | PathLike[str] | None = None) -> Inception:
    """The network with its weights, on the CPU.

    Args:
        path: the weights' file; by default what torch.hub's folder has.

    Raises:
        InputError: no weights, no torch-fidelity, or another file.
    """
    found = Path(path) if path else find_inception()
    if found is None:
        raise InputError(f"FID has no weights: put torch-fidelity's {FILES[0]} into {_hub()}, or name its path")
    return Inception(found)


def find_inception() -> Path | None:
    """The weights in torch.hub's folder, if they are there."""
    return next((_hub() / file for file in FILES if (_hub() / file).is_file()), None)


def _hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _check(path: Path) -> None:
    """That these are the weights, and tensors alone: torch-fidelity unpickles whatever a file holds."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(HASH):
            raise InputError(f"{path}: its SHA-256 begins with {found[:8]}, that of FID's Inception with {HASH}")
        torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): fetch it again") from error
