"""What turns prepared pictures into tokens: a model in PyTorch, or an exported encoder on ONNX Runtime."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.environment import environment
from qlip.errors import InputError
from qlip.integrations.onnx import OnnxEncoder
from qlip.model.checkpoint import load
from qlip.model.config import QLIPConfig
from qlip.model.image import ImageProcessor
from qlip.precision import warn_if_slow

Size = int | tuple[int, int] | None


@dataclass(frozen=True)
class Encoder:
    """An encoder, opened on one process.

    Attributes:
        name: of the tokenizer.
        id_hash: name of its ids.
        config: of the tokenizer.
        processor: prepares pictures for it.
        run: (B, 3, H, W) on the CPU → (B, N) there.
        used: hardware and versions that compute.
    """

    name: str
    id_hash: str
    config: QLIPConfig
    processor: ImageProcessor
    run: Callable[[Tensor], Tensor]
    used: dict[str, str]

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, N) int64, on the CPU; B may be 0."""
        if not len(pixel_values):
            return torch.empty(0, self.config.num_tokens, dtype=torch.int64)
        return self.run(pixel_values)

    @classmethod
    def with_torch(cls, name: str, device: torch.device, dtype: str, image_size: Size) -> "Encoder":
        """A model, as `qlip.load` takes it.

        Raises:
            InputError: it is not to be had, or has no image processor.
        """
        warn_if_slow(device, getattr(torch, dtype))
        model = load(name, device=device, dtype=getattr(torch, dtype), image_size=image_size)
        exact = model if dtype == "float32" else load(name)  # rounded weights have another hash

        @torch.inference_mode()
        def run(pixel_values: Tensor) -> Tensor:
            return model.tokens_of(pixel_values.to(model.device)).cpu()

        used = environment(str(device)) | {"device": str(device)}
        return cls(model.name, exact.id_hash(), model.config, model.need_image_processor(), run, used)

    @classmethod
    def with_onnx(cls, folder: str, device: str, dtype: str, image_size: Size) -> "Encoder":
        """An export, whose dtype and image size are fixed.

        Raises:
            InputError: ONNX Runtime is missing, this is no such folder, or it has another dtype or image size.
        """
        if dtype != "float32":
            raise InputError(f"dtype={dtype!r}: an exported encoder computes in float32, leave it out")
        found = OnnxEncoder.open(folder, device)
        model = found.description
        if image_size is not None and model.config.at_size(image_size).size != model.config.size:
            height, width = model.config.size
            raise InputError(
                f"image_size={image_size}: {folder} was exported for pictures of {height} × {width} pixels: "
                "export it again with --image-size"
            )
        used = environment("cpu") | found.used
        return cls(model.name, found.id_hash, model.config, model.need_image_processor(), found.run, used)
