"""A vision model of `transformers` as a teacher (extra `transformers`): images to a pooled feature and a grid."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qlip.environment import resolve_device
from qlip.errors import InputError, one_line

try:
    from transformers import AutoImageProcessor, AutoModel
except ImportError as error:
    raise InputError(
        "a vision model as teacher needs the library `transformers`: pip install 'open-qlip[transformers]'"
    ) from error


@dataclass(frozen=True)
class Prepare:
    """An RGB image → (3, H, W), as an image processor of `transformers` prepares it."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare one image."""
        return torch.as_tensor(self.processor(images=image, return_tensors="pt")["pixel_values"][0])


class VisionModel:
    """A vision model, or the vision tower of a model such as CLIP, in float32.

    Attributes:
        name: folder or hub id.
        hash: of the weights.
        prepare: prepares an image for it.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", compile: bool = False):
        """Load the model and its image processor.

        Args:
            name: folder or hub id.
            device: where; "auto" takes a GPU if there is one.
            compile: with `torch.compile`.

        Raises:
            InputError: there is no such model, or it has no weights for a part of it.
        """
        try:
            self.prepare = Prepare(AutoImageProcessor.from_pretrained(name))
            model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{name!r} is no vision model of transformers ({one_line(error)})") from error
        missing = report["missing_keys"]
        if lacking := [key for key in missing if "pooler" not in key]:
            raise InputError(f"{name!r} has no weights for {sorted(lacking)[0]}: it is not a trained vision model")
        model = getattr(model, "vision_model", model)
        self.name, self.hash = name, _hash(model)
        self._has_pooler, self._patch = not missing, getattr(model.config, "patch_size", None)
        self.device = resolve_device(device)
        model = model.to(self.device, memory_format=torch.channels_last).eval()
        # Frozen weights can be laid out anew and merged with batch normalisation.
        self._model = torch.compile(model, dynamic=False, options={"freezing": True}) if compile else model

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features of images.

        Args:
            pixel_values: (B, 3, H, W) of `prepare`.

        Returns:
            The pooled feature (B, C): the model's own, else the CLS token, else the mean of the grid. And the grid
            of the last layer, (B, C', rows, columns), or None where the model has none.
        """
        pixel_values = pixel_values.to(self.device, memory_format=torch.channels_last)
        output: Any = self._model(pixel_values=pixel_values)
        states = output.last_hidden_state
        pooled = getattr(output, "pooler_output", None) if self._has_pooler else None
        grid, num_before = self._grid(states, pixel_values.shape[2:])
        if pooled is None:
            pooled = states[:, 0] if grid is None or num_before else grid.mean((2, 3))
        return pooled.flatten(1), grid

    def _grid(self, states: Tensor, size: Sequence[int]) -> tuple[Tensor | None, int]:
        """The grid, and the number of tokens before it: CLS, registers."""
        if states.ndim == 4:
            return states, 0
        length = states.shape[1]
        rows = columns = math.isqrt(length)  # of a model that merges its patches, such as Swin
        if isinstance(self._patch, int) and (size[0] // self._patch) * (size[1] // self._patch) <= length:
            rows, columns = (side // self._patch for side in size)
        elif rows * columns != length:
            return None, 0
        num_before = length - rows * columns
        return states[:, num_before:].mT.unflatten(2, (rows, columns)), num_before


def _hash(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
