"""`qlip.model.image.ImageProcessor` as an image processor of transformers; it needs no torchvision."""

from collections.abc import Iterator
from typing import Any

from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from qlip.model.image import ImageProcessor, as_images


class QLIPImageProcessor(BaseImageProcessor):
    """Gives the pixels that `qlip.load(…).image_processor` gives, bit for bit.

    Attributes:
        size, crop_size, resample, image_mean, …: the fields of a CLIP `preprocessor_config.json`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any):
        """Take the fields of a `preprocessor_config.json`; an absent one has CLIP's default.

        Raises:
            InputError: a field is malformed, or asks for another kind of preprocessing.
        """
        fields = ImageProcessor.from_dict(kwargs).to_dict()
        del fields["image_processor_type"]  # transformers writes the class's name
        super().__init__(**kwargs | fields)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Turn pictures into what the model takes.

        Args:
            images: one or many, in any form that `qlip.model.image.read_image` takes; lists may be nested.
            return_tensors: "np" for an array; a tensor by default.
            kwargs: fields that are to differ from the processor's.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised.

        Raises:
            InputError: an image cannot be read, or a field is malformed.
        """
        processor = ImageProcessor.from_dict(self.to_dict() | kwargs)
        return BatchFeature({"pixel_values": processor(list(_flat(images)))}, tensor_type=return_tensors)


def _flat(images: Any) -> Iterator[Any]:
    for image in as_images(images):
        if isinstance(image, list | tuple):
            yield from _flat(image)
        else:
            yield image
