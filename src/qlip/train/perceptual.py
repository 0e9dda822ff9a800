"""The perceptual loss of stage 2: LPIPS (Zhang et al. 2018, arXiv 1801.03924) on the features of a frozen VGG16.

The weights are not ours to pack. Two sets are read where they lie, by file; the packages that carry them are not
imported, because they ask for libraries that we keep out:

- `lpips`: the standard. PyTorch's VGG16 of ImageNet (`vgg16-397923af.pth`, which fetching it from PyTorch's model
  zoo leaves in torch.hub's folder), and the linear heads in the package `lpips`.
- `st-lpips`: the shift-tolerant variant (Ghildyal & Liu 2022, arXiv 2207.13686) in the package
  `stlpips-pytorch`, which installs nothing else. Another network, whose numbers are not those of LPIPS.
"""

import logging
import re
from importlib.util import find_spec
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from qlip.errors import InputError, one_line

Variant = Literal["auto", "lpips", "st-lpips"]

FILES = {"lpips": ("vgg16-397923af.pth", "vgg.pth"), "st-lpips": ("vgg_shift_tolerant.pth",)}
REMEDIES = {
    "vgg16-397923af.pth": "put PyTorch's {file} (VGG16 of ImageNet) into {hub}",
    "vgg.pth": "pip install --no-deps lpips",
    "vgg_shift_tolerant.pth": "pip install 'open-qlip[perceptual]'",
}
PACKAGES = {"vgg.pth": "lpips/weights/v0.1", "vgg_shift_tolerant.pth": "stlpips_pytorch/weights/vST0.0"}

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16's widths
MIN_SIZE = 18  # in a smaller picture the last blur of the shift-tolerant network has too little to mirror

_CONV = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")  # in PyTorch's file, in stlpips-pytorch's
_HEAD = re.compile(r"lin(\d)\.model\.1\.weight")


class Perceptual(nn.Module):
    """LPIPS: Σ over blocks of the mean over positions of w·(f̂(a) − f̂(b))², f̂ the features scaled to unit length.

    Frozen: no weight asks for a gradient, and there is no mode but evaluation. Under autocast the network runs in
    the ambient precision and the distance in float32, because it squares small differences of unit vectors and
    sums over every position. On photographs that keeps bfloat16 within 1 % of float32, 7 % where the pictures
    differ by less than a grey level, and equal pictures at exactly 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shift_tolerant: bool):
        """Lay out the network; `load_perceptual` fills it (no random numbers are drawn).

        Args:
            shift_tolerant: pool as ST-LPIPS does: a dense maximum, then a blur that subsamples.
        """
        super().__init__()
        self.shift_tolerant = shift_tolerant
        widths = [3, *(width for block in BLOCKS for width in block)]
        self.convs = nn.ModuleList(skip_init(nn.Conv2d, n, m, 3, padding=1) for n, m in pairwise(widths))
        self.heads = nn.ParameterList(torch.empty(1, block[-1], 1, 1) for block in BLOCKS)
        # ImageNet's; what LPIPS says of [-1,1] pixels (shift -0.030 …, scale 0.458 …) is the same in [0,1]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of pictures.

        Args:
            a: (B, 3, H, W) RGB in [0,1], what is learnt; a reconstruction may overshoot. H, W ≥ 18.
            b: (B, 3, H, W) likewise, the reference; no gradient flows to it.

        Returns:
            (B,) float32, ≥ 0, differentiable in `a`.

        Raises:
            InputError: the shapes differ, or are not those of pictures, or too small.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < MIN_SIZE:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise InputError(
                f"pictures of shape {shapes}: give both as (B, 3, H, W) of at least {MIN_SIZE} pixels"
            )
        with torch.no_grad():
            references = self._features(b)
        features = self._features(a)
        with torch.autocast(a.device.type, enabled=False):
            layers = zip(features, references, self.heads, strict=True)
            return sum((_unit(f) - _unit(r)).square().mean((2, 3)) @ head.flatten() for f, r, head in layers)

    def _features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) → what each block ends in, after its ReLU."""
        x = (x.float() - self.mean) / self.std
        convs = iter(self.convs)
        features: list[Tensor] = []
        for block in BLOCKS:
            if features:
                x = _blur_pool(x) if self.shift_tolerant else F.max_pool2d(x, 2)
            for _ in block:
                x = F.relu(next(convs)(x), inplace=True)
            features.append(x)
        return features


def load_perceptual(variant: Variant = "auto", folder: str | PathLike[str] | None = None) -> Perceptual:
    """The perceptual loss with its weights; the log says which.

    Args:
        variant: "lpips", "st-lpips", or "auto": LPIPS if its files are there, else ST-LPIPS.
        folder: where to look for the files, under their published names (`FILES`), instead of torch.hub's folder
            and the installed packages.

    Returns:
        The loss, on the CPU.

    Raises:
        InputError: no weights, which says how to get them; or a file that is damaged or something else.
    """
    if variant not in ("auto", *FILES):
        raise InputError(f"perceptual variant {variant!r}: choose one of auto, {', '.join(FILES)}")
    lacking: dict[str, list[str]] = {}
    for name in FILES if variant == "auto" else (variant,):
        paths = {file: _find(file, folder) for file in FILES[name]}
        lacking[name] = [file for file, path in paths.items() if path is None]
        if not lacking[name]:
            perceptual = Perceptual(shift_tolerant=name == "st-lpips")
            found = [path for path in paths.values() if path]
            _fill(perceptual, found)
            logging.getLogger("qlip").info("perceptual loss: %s, weights of %s", name.upper(), _names(found))
            return perceptual
    remedies = []
    for name, files in reversed(lacking.items()):
        steps = (f"put {f} into {folder}" if folder else REMEDIES[f].format(file=f, hub=_hub()) for f in files)
        remedies.append(f"for {name.upper()} {' and '.join(steps)}")
    raise InputError(f"the perceptual loss has no weights: {'; or '.join(remedies)}")


def _unit(x: Tensor) -> Tensor:
    """Unit length over channels; `vector_norm` has a gradient at 0, √Σx² a NaN that `detect_anomaly` stops at."""
    x = x.float()
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def _blur_pool(x: Tensor) -> Tensor:
    """Halve (H → H//2 + 1): maximum of 2×2 at every position, mirrored by 2, then [1,2,1]/4 both ways, stride 2.

    The blur is two means of two, one after the other. The mirror goes by index, because the gradient of F.pad's
    has no fixed order of sums on a GPU, and a run could not be repeated to the bit.
    """
    x = F.max_pool2d(x, 2, stride=1)
    for dim in (2, 3):
        last = x.shape[dim] - 1
        index = torch.arange(-2, last + 3, device=x.device).abs()
        x = x.index_select(dim, last - (last - index).abs())
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2)


def _find(file: str, folder: str | PathLike[str] | None) -> Path | None:
    """Where a file lies, or None; its package is found, not imported."""
    if folder is not None:
        places = [Path(folder)]
    elif file in PACKAGES:
        package, inside = PACKAGES[file].split("/", 1)
        spec = find_spec(package)
        places = [Path(root) / inside for root in (spec and spec.submodule_search_locations) or ()]
    else:
        places = [_hub()]
    return next((place / file for place in places if (place / file).is_file()), None)


def _hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _fill(perceptual: Perceptual, paths: list[Path]) -> None:
    """Read the tensors that we need, by their names in the files; VGG16's classifier is left."""
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            convs = {(int(m[1]), m[2]): tensors[m[0]] for m in map(_CONV.fullmatch, tensors) if m}
            heads = {int(m[1]): tensors[m[0]] for m in map(_HEAD.fullmatch, tensors) if m}
        except Exception as error:  # the unpickler raises nearly anything on a damaged file
            reason = one_line(error).split(". ")[0]
            raise InputError(f"{path} cannot be read ({reason}): fetch or install it again") from error
        order = sorted({index for index, _ in convs})
        state |= {f"convs.{order.index(index)}.{name}": value for (index, name), value in convs.items()}
        state |= {f"heads.{index}": value for index, value in heads.items()}
    try:
        perceptual.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{_names(paths)}: not the weights that the name says ({reason})") from error


def _names(paths: list[Path]) -> str:
    return " and ".join(map(str, paths))
