"""Pictures in, `pixel_values` out: reading any image, and CLIP's resize, centre crop and normalisation.

A picture goes `read_image` → `ImageProcessor.preprocess` (8 bits, the crop) → `ImageProcessor.normalize`;
calling the processor does all three. `ImageProcessor.denormalize` is the way back.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.errors import InputError, one_line
from qlip.guarded import read_json
from qlip.image_files import TooLarge, max_pixels, open_image, orientation_of, read_file

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Resize = Literal["crop", "squash"]
_BY = "prepared_by"  # who made an image, in its `info`

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and its value

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def as_images(images: Any) -> list[ImageSource]:
    """Tell one picture from many, reading none of them.

    Args:
        images: a list or tuple, or a 4-D tensor or array, is many; anything else is one.

    Returns:
        The sources, each to be handed to `read_image`.
    """
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4):
        return list(images)
    return [images]


def read_image(source: ImageSource) -> Image.Image:
    """Read one picture as RGB with 8 bits a channel.

    It is turned upright as its EXIF orientation says, once: the result has no orientation left. Transparency is
    laid over white, and of an animation the first frame is taken. Grey of 16 bits (I;16, I) is scaled to 8, not
    clipped. Mode I whose values all fit 8 bits, and F whose values pass 1 and fit 8 bits, are taken as they stand,
    as PIL itself makes them.

    Args:
        source: a path; an encoded file's bytes; a PIL image; or a tensor or array, uint8 or floating in
            [0, 1], of shape (C, H, W) or (H, W, C), with C of 1, 3 or 4 (a shape that could be either is
            refused), or (H, W). Floats are rounded to 8 bits, so that a tensor reads the same as the PNG saved
            from it.

    Returns:
        A new PIL image of mode RGB.

    Raises:
        InputError: the source is missing, empty, damaged, not an image, its values are
            out of range, or it costs more to read than an image may; see `qlip.image_files`.
    """
    if isinstance(source, (str, os.PathLike)):
        name = repr(os.fspath(source))  # escaped: one line, whatever the name holds
        try:
            content = read_file(source, pipes=True)
        except ValueError as error:  # a NUL in the name, too
            raise InputError(f"{name} cannot be opened ({one_line(error)}): check the path") from error
        return _decode(content, name)
    if isinstance(source, bytes):
        return _decode(source, f"the image of {len(source)} bytes")
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "")
        return _to_rgb(source, repr(name) if name else "the PIL image")
    if isinstance(source, (np.ndarray, Tensor)):
        return _to_rgb(_from_array(source), "the array")
    raise InputError(
        f"{type(source).__name__} is not an image: pass a path, bytes, a PIL image, an array or a tensor"
    )


def _decode(content: bytes, name: str) -> Image.Image:
    image = _open(content, name)
    pixels = _to_rgb(image, name)
    if _is_animated(image):
        pixels.info["first_frame"] = True
    return pixels


def _is_animated(image: Image.Image) -> bool:
    """Whether there is more to see; JPEG's further images are previews and the like."""
    try:
        return image.format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF") and getattr(image, "is_animated", False)
    except Exception:  # what follows the first frame is damaged, or too much
        return True


def _open(content: bytes, name: str) -> Image.Image:
    if not content:
        raise InputError(f"{name} is empty: replace it or leave it out")
    try:
        return open_image(content)
    except Exception as error:  # PIL's decoders raise almost anything on a damaged file
        raise _unreadable(name, error) from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        clear, inverted = _clear_value(image), _is_inverted(image)
        image.load()
        if 0 in image.size:
            raise InputError("it has no pixels")
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _to_8_bits(image, clear, inverted)
        elif clear is not None:
            image.info["transparency"] = clear
        if image.has_transparency_data:
            image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.info = {}  # its orientation among them: it would be turned again by whoever reads this image
        return image
    except Exception as error:
        raise _unreadable(name, error) from error


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) float32 in [0, 1], as `QLIP.detokenize` gives them → PIL pictures."""
    rows = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in rows]


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF orientation says."""
    # Not ImageOps.exif_transpose: it also rewrites the other tags, and fails on those it cannot write.
    orientation = orientation_of(image)
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image.copy()


def _clear_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """The value that is transparent, on the scale of the decoded pixels; None where PIL has it right itself."""
    value, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.mode.startswith("I"):
        return value
    raw_mode = tiles[0][3] if tiles and image.format == "PNG" else None
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        return value * {"L;2": 85, "L;4": 17}[raw_mode]
    if raw_mode == "RGB;16B" and isinstance(value, tuple):
        return tuple(part >> 8 for part in value)
    return None


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white, which PIL undoes in a TIFF of up to 8 bits, and not in one of more."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _to_8_bits(image: Image.Image, clear: int | tuple[int, ...] | None, inverted: bool) -> Image.Image:
    """Grey of more than 8 bits → L, or LA where a value is transparent."""
    values = np.asarray(image)
    whites = {"F": (1, 255), "I": (255, 65535)}.get(image.mode, (65535,))
    low, high = values.min(), values.max()
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        raise InputError(f"its values range over [{low}, {high}], scale them to [0, {whites[-1]}]")
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    if inverted:
        grey = 255 - grey
    if clear is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(values == clear, 0, 255).astype(np.uint8)], -1))


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputError(f"an image of {array.dtype} has no known range: pass uint8, or floats in [0, 1]")
    pixels = array[None] if array.ndim == 2 else array
    first, last = (pixels.ndim == 3 and pixels.shape[end] in (1, 3, 4) for end in (0, -1))
    if not pixels.size or not (first or last):
        raise InputError(f"an array of shape {array.shape} is not one image: pass (3, H, W)")
    if first and last and array.ndim == 3 and array.size > 1:
        raise InputError(f"an array of shape {array.shape} is either (C, H, W) or (H, W, C): pass a PIL image")
    if first:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype.kind == "f":
        pixels = _quantize(pixels)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _quantize(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.astype(np.float32)
    low, high = pixels.min(), pixels.max()
    if not (low >= -0.5 / 255 and high <= 255.5 / 255):  # farther out than rounding reaches, or NaN
        raise InputError(
            f"the image's floats range over [{low:.4g}, {high:.4g}], not [0, 1]: "
            "divide by 255, or denormalize pixel_values first"
        )
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _unreadable(name: str, error: Exception) -> InputError:
    if isinstance(error, Image.DecompressionBombError):  # some decoders check the size themselves
        error = TooLarge("too many", max_pixels())
    if isinstance(error, TooLarge):
        return InputError(f"{name} {error}")
    return InputError(f"{name} cannot be read as an image ({one_line(error)}): replace it or leave it out")


@dataclass(frozen=True)
class ImageProcessor:
    """CLIP's preprocessing: resize the short side, crop the centre, normalise.

    It gives the 8-bit pixels that `transformers`' CLIPImageProcessorPil gives. Of a picture whose resized
    long side would pass 64 crops, only what the crop needs is resized: the same but for rounding.

    A crop that is no square is CLIP's too, in `preprocessor_config.json`, but where CLIP would leave black what a
    picture lacks beside its short side, we make the picture larger.

    Attributes:
        resize: the short side after resizing, in pixels. For a crop that is no square, a picture of the crop's
            aspect; one of another aspect is made just large enough to cover that.
        crop: the side of the square that is cut from the centre, or height and width, in pixels; what lies outside
            the resized picture is black.
        resample: a `PIL.Image.Resampling`; bicubic by default.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].

    Raises:
        InputError: a field is out of range.
    """

    resize: int
    crop: int | tuple[int, int]
    resample: int = Image.Resampling.BICUBIC
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if not _is_int(self.resize) or self.resize < 1:
            raise InputError(f"resize={self.resize!r}: use a number of pixels, at least 1")
        if len(self.size) != 2 or not all(_is_int(side) and side >= 1 for side in self.size):
            raise InputError(f"crop={self.crop!r}: use a number of pixels, at least 1, or height and width")
        if not _is_int(self.resample) or self.resample not in list(Image.Resampling):
            raise InputError(f"resample={self.resample!r}: use a PIL.Image.Resampling, such as 3 for bicubic")
        for field in ("mean", "std"):
            value = getattr(self, field)
            if not _is_rgb(value) or (field == "std" and min(value) <= 0):
                raise InputError(f"{field}={value!r}: use three finite numbers, above 0 for std")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what it gives, in pixels."""
        return self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)

    def at_size(self, size: tuple[int, int]) -> "ImageProcessor":
        """The same for pictures of another height and width, with as much cut off at their edges."""
        resize = round(self.resize * min(size) / min(self.size))
        return replace(self, resize=resize, crop=_crop(*size))

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ImageProcessor":
        """Read the fields of a CLIP `preprocessor_config.json`; an absent one has CLIP's default.

        Raises:
            InputError: a field is malformed, or asks for another kind of preprocessing.
        """
        config = {key: value for key, value in config.items() if value is not None}
        for flag in ("do_resize", "do_center_crop", "do_rescale"):
            if not config.get(flag, True):
                raise InputError(f"{flag}=false: the model takes pictures of one size and range, set it to true")
        factor = config.get("rescale_factor", 1 / 255)
        if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
            raise InputError(f"rescale_factor={factor!r}: use 1/255, pictures have 8 bits")
        normalized = config.get("do_normalize", True)
        return cls(
            resize=_sides(config.get("size", 224), "size", ("shortest_edge",))[0],
            crop=_crop(*_sides(config.get("crop_size", 224), "crop_size", ("height", "width"))),
            resample=config.get("resample", Image.Resampling.BICUBIC),
            mean=_as_tuple(config.get("image_mean", CLIP_MEAN)) if normalized else (0.0, 0.0, 0.0),
            std=_as_tuple(config.get("image_std", CLIP_STD)) if normalized else (1.0, 1.0, 1.0),
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "ImageProcessor":
        """Read a `preprocessor_config.json`.

        Raises:
            InputError: the file is missing or malformed; names the file and the field.
        """
        try:
            config = read_json(path)
            if not isinstance(config, dict):
                raise InputError("it holds no JSON object")
            return cls.from_dict(config)
        except (OSError, ValueError) as error:
            raise InputError(f"{os.fspath(path)!r} is not a usable image processor: {one_line(error)}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields of a CLIP `preprocessor_config.json`: the inverse of `from_dict`."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.resize},
            "resample": int(self.resample),
            "do_center_crop": True,
            "crop_size": dict(zip(("height", "width"), self.size, strict=True)),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json` into `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def __call__(self, images: Any) -> Tensor:
        """Turn pictures into what the model takes.

        Args:
            images: one or many, in any form that `read_image` and `as_images` take.

        Returns:
            pixel_values (B, 3, H, W) float32, normalised.

        Raises:
            InputError: an image cannot be read.
        """
        pixels = [self.normalize(self.preprocess(image)) for image in as_images(images)]
        return torch.stack(pixels) if pixels else torch.empty(0, 3, *self.size)

    def preprocess(self, image: ImageSource, resize: Resize = "crop") -> Image.Image:
        """Read one image and bring it to size.

        Args:
            image: see `read_image`. One that this processor has prepared stays as it is.
            resize: "crop": the short side to the processor's length, then the middle; "squash": the whole image to
                the crop's size, whatever its aspect.

        Returns:
            8-bit RGB of the crop's size: what the model sees, to compare its reconstruction with. Its `info` tells
            whether something was left out: `first_frame` of an animation, `cropped`.

        Raises:
            InputError: the image cannot be read.
        """
        if isinstance(image, Image.Image) and image.size == self.size[::-1] and image.info.get(_BY) == self:
            return image
        image = read_image(image)
        prepared = self._crop(image) if resize == "crop" else image.resize(self.size[::-1], self.resample)
        height, width = self.size
        ratio = image.width * height / (image.height * width)  # 1: all of it is seen, but for rounding
        is_cropped = resize == "crop" and not 0.98 < ratio < 1.02
        prepared.info = image.info | {_BY: self} | ({"cropped": True} if is_cropped else {})
        return prepared

    def _crop(self, image: Image.Image) -> Image.Image:
        crop_height, crop_width = self.size
        sides = zip(image.size, (crop_width, crop_height), strict=True)
        short, crop = min(sides, key=lambda side: side[0] / side[1])  # short beside the crop's
        resize = round(self.resize * crop / min(self.size))
        width, height = (int(resize * side / short) for side in image.size)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        part = (left, top, left + crop_width, top + crop_height)
        if max(width, height) > 64 * max(self.size):  # 1x30,000 pixels would become 256x7,680,000
            return _resize_part(image, (width, height), part, self.resample)
        return image.resize((width, height), self.resample).crop(part)

    def normalize(self, image: Image.Image | np.ndarray) -> Tensor:
        """Take the mean off and divide by the standard deviation.

        Args:
            image: RGB, or an array (H, W, 3) of uint8.

        Returns:
            (3, H, W) float32.

        Raises:
            InputError: it is not 8-bit RGB.
        """
        pixels = torch.from_numpy(np.array(image))
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise InputError(
                f"normalize takes (H, W, 3) of uint8, not {tuple(pixels.shape)} of {pixels.dtype}: "
                "use read_image or preprocess first"
            )
        mean, std = self._statistics(pixels.device)
        return (pixels.permute(2, 0, 1).contiguous().float() / 255 - mean) / std

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Undo `normalize`.

        Args:
            pixel_values: (..., 3, H, W), normalised.

        Returns:
            The same shape in [0, 1], clamped; float32, or float64 if that is given.
        """
        mean, std = self._statistics(pixel_values.device)
        return (pixel_values * std + mean).clamp(0, 1)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=device)[..., None, None]
        return mean, std


def _resize_part(
    image: Image.Image, size: tuple[int, int], part: tuple[int, int, int, int], resample: int
) -> Image.Image:
    """`image.resize(size, resample).crop(part)`, without making what lies outside `part`."""
    scale_x, scale_y = image.width / size[0], image.height / size[1]
    x0, y0, x1, y1 = max(part[0], 0), max(part[1], 0), min(part[2], size[0]), min(part[3], size[1])
    # Cut whole source pixels first, with what the filters reach (Lanczos: 3): PIL's box is only float32.
    margin_x, margin_y = 3 * math.ceil(scale_x) + 1, 3 * math.ceil(scale_y) + 1
    left, top = max(int(x0 * scale_x) - margin_x, 0), max(int(y0 * scale_y) - margin_y, 0)
    right = min(math.ceil(x1 * scale_x) + margin_x, image.width)
    bottom = min(math.ceil(y1 * scale_y) + margin_y, image.height)
    image = image.crop((left, top, right, bottom))
    # Rows, then columns: each pass rounds to 8 bits, so their order shows.
    box_x = (x0 * scale_x - left, 0, x1 * scale_x - left, image.height)
    image = image.resize((x1 - x0, image.height), resample, box_x)
    box_y = (0, y0 * scale_y - top, image.width, y1 * scale_y - top)
    image = image.resize((image.width, y1 - y0), resample, box_y)
    return image.crop((part[0] - x0, part[1] - y0, part[2] - x0, part[3] - y0))


def _sides(value: Any, field: str, keys: tuple[str, ...]) -> list[int]:
    """A config's size: a number for all of `keys`, or a dict in which these, and no others, have numbers."""
    given = value if isinstance(value, dict) else dict.fromkeys(keys, value)
    given = {key: number for key, number in given.items() if number is not None}
    if given.keys() != set(keys) or not all(map(_is_int, given.values())):
        raise InputError(f"{field}={value!r}: use {json.dumps(dict.fromkeys(keys, 256))}")
    return [given[key] for key in keys]


def _crop(height: int, width: int) -> int | tuple[int, int]:
    return height if height == width else (height, width)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rgb(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in value)
    )
