"""Checkpoints in and out, in the published layout.

A checkpoint is a folder: `config.json`, `model.safetensors`, and where it has them `preprocessor_config.json`
and a text vocabulary (`tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`).
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlip.environment import resolve_device
from qlip.errors import InputError, one_line
from qlip.files import save_tensors
from qlip.guarded import Header, TensorInfo, check_layers, read_header, read_object
from qlip.model.config import QLIPConfig
from qlip.model.hub import COMPANIONS, CONFIG, PICKLES, PREPROCESSOR, WEIGHTS, fetch, no_weights
from qlip.model.image import ImageProcessor
from qlip.model.qlip import QLIP
from qlip.model.text import TextTokenizer

logger = logging.getLogger("qlip")

BUNDLED = Path(__file__).parents[1] / "models"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = ("F32", "BF16", "F16", "F64")  # the same, as files spell them

# Tables that every model computes for itself, no weights: rotary ones, once a tower or once a layer; CLIP's.
DERIVED = re.compile(r"(.+\.)?(rope\.freqs_(cos|sin)|position_ids|attn_mask)")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    image_size: int | Sequence[int] | None = None,
) -> QLIP:
    """Load a tokenizer.

    Weights whose dtype is the file's stay mapped from the file: they take no memory before they are used, and
    changing them does not change the file.

    Args:
        name: a tokenizer that comes with this package (`bundled()` lists them), else a folder, else a
            Hugging Face repository, "owner/name".
        device: where the model goes; "auto" takes a GPU if there is one.
        dtype: of the weights; float32, bfloat16, float16 or float64.
        revision: branch, tag or commit of the repository.
        image_size: side, or height and width, of the pictures to work on, in pixels: multiples of the patch size.
            The weights stay; positions are interpolated and rotary ones computed for the new grid. By default the
            checkpoint's own size.

    Returns:
        The model in eval mode. What the checkpoint lacks, `image_processor` or `text_tokenizer`, is None.

    Raises:
        InputError: there is no such checkpoint, or it is broken; names the file and the key. Or `image_size` holds
            no whole patches.
    """
    _check_dtype(dtype)
    device = resolve_device(device)
    folder, model_name = _find(name, revision)
    if not os.path.exists(folder / WEIGHTS):
        raise no_weights(repr(str(folder)), (path.name for path in folder.glob("*")))
    header = _read_header(folder / WEIGHTS)
    model = load_description(folder, model_name, image_size, header)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = _read_weights(folder / WEIGHTS, header, shapes)
    model.load_state_dict({key: value.to(device, dtype) for key, value in weights.items()}, assign=True)
    return model.to(device).eval()


def called(folder: str | os.PathLike[str]) -> str:
    """What the model of a folder is called: as the folder is, and what a training left in RUN/model as the run."""
    folder = Path(folder).resolve()
    return (folder.parent.name if folder.name == "model" else folder.name) or "model"


def is_hub_id(name: str) -> bool:
    """Whether `load` would look on the hub: owner/name, and nothing here is called so."""
    return not os.path.exists(name) and _HUB_ID.fullmatch(name) is not None


def load_for(
    model: str,
    tokenizer: str | os.PathLike[str] | QLIP | None,
    trained_with: str,
    id_hash: str,
    device: str | torch.device = "cpu",
) -> QLIP:
    """The tokenizer whose ids a model speaks of.

    Args:
        model: what it is called, for messages.
        tokenizer: one with the same ids, whose decoder may be better; None: the one it was trained with.
        trained_with: the name of that.
        id_hash: the name of its ids.
        device: where it goes.

    Raises:
        InputError: there is no such tokenizer, or it makes other ids.
    """
    if not isinstance(tokenizer, QLIP):
        try:
            tokenizer = load(tokenizer or trained_with, device=device)
        except InputError as error:
            raise InputError(f"the tokenizer of {model!r}: {error}; --tokenizer takes one of its ids") from error
    if (found := tokenizer.id_hash()) != id_hash:
        raise InputError(
            f"{model!r} was trained on ids {id_hash} of {trained_with!r}, but {tokenizer.name!r} makes {found}: "
            "name the tokenizer that it was trained with"
        )
    return tokenizer


def skeleton(config: QLIPConfig, name: str = "unnamed") -> QLIP:
    """A model whose weights are on the meta device: for `load_state_dict(…, assign=True)`."""
    with torch.device("meta"), _Unfilled():
        return QLIP(config, name=name)


def save(model: QLIP, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint that `load` reads again, bit for bit.

    Everything is written beside and renamed when it is complete, so that a failure leaves what was there.

    Args:
        model: on any device.
        folder: made if need be; the files of a checkpoint that is there are replaced.
        dtype: of the weights in the file; the model's by default.

    Raises:
        InputError: the folder cannot be written.
    """
    _check_dtype(dtype or model.dtype)
    weights = {key: value.to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as beside:
            _write(model, weights, Path(beside))
            for file in (CONFIG, WEIGHTS, *COMPANIONS):
                if (Path(beside) / file).exists():
                    os.replace(Path(beside) / file, folder / file)
                else:  # or a vocabulary of before would speak for this model
                    (folder / file).unlink(missing_ok=True)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise InputError(f"{str(folder)!r} cannot be written ({one_line(error)}): use another folder") from error


def bundled() -> list[str]:
    """Names of the tokenizers that come with this package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{PREPROCESSOR}"))  # language models have none


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: weights are one of {', '.join(map(str, DTYPES))}")


def _find(name: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    """The checkpoint's folder, and what the model is called."""
    folder = Path(name)
    if name in bundled():
        folder = BUNDLED / str(name)
    elif isinstance(name, str) and is_hub_id(name):
        return fetch(name, revision), name
    if revision is not None:
        raise InputError(f"revision={revision!r}: {str(name)!r} is no Hugging Face repository, leave it out")
    if os.path.isfile(folder) and folder.suffix in PICKLES:
        raise no_weights(repr(str(folder.parent)), [folder.name])
    if os.path.isfile(folder):
        raise InputError(f"{str(folder)!r} is a file: pass the folder that it is in")
    if not os.path.isdir(folder):
        raise InputError(
            f"{str(name)!r} is not known: use a bundled tokenizer ({', '.join(bundled()) or 'there is none'}), "
            "a folder, or a Hugging Face repository 'owner/name'"
        )
    return folder, called(folder)


def _read_config(path: Path) -> QLIPConfig:
    try:
        return QLIPConfig.from_dict(read_object(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a usable model configuration: {one_line(error)}") from error


def _read_header(path: Path) -> Header:
    try:
        return read_header(path)
    except (OSError, InputError) as error:
        raise _not_whole(path, error) from error


def _read_weights(path: Path, header: Header, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Map the file's tensors, which must be these and no others."""
    found = {key: info for key, info in header.tensors.items() if not DERIVED.fullmatch(key)}
    _compare(path, found, shapes, [key for key in found if key not in shapes])
    try:
        return {key: value for key, value in load_file(path).items() if key in found}
    except (SafetensorError, OSError) as error:
        raise _not_whole(path, error) from error


def _compare(
    path: Path, found: Mapping[str, TensorInfo], shapes: dict[str, tuple[int, ...]], others: Sequence[str] = ()
) -> None:
    """Whether a header has tensors of these shapes; `others` are those that it should not have."""
    both = [key for key in shapes if key in found]
    problems = {
        "it lacks": [repr(key) for key in shapes if key not in found],
        "it has besides": [repr(key) for key in others],
        "shapes differ:": [
            f"{key!r} is {found[key].shape}, not {shapes[key]}" for key in both if found[key].shape != shapes[key]
        ],
        "these are no weights:": [
            f"{key!r} is {found[key].dtype}" for key in both if found[key].dtype not in STORED
        ],
    }
    if text := "; ".join(f"{problem} {_some(items)}" for problem, items in problems.items() if items):
        raise InputError(f"{str(path)!r} is not of the model in its {CONFIG}, take both from one place: {text}")


def _check_scale(config: QLIPConfig, header: Header, path: Path) -> None:
    """Whether the weights are of so many layers and positions, before layers and rotary tables are made."""
    vision, text, decoder = config.vision, config.text, config.decoder
    try:
        check_layers(sum(tower.num_hidden_layers for tower in (vision, text, decoder)), header)
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}: take it and its {CONFIG} from one place") from error
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.position_embedding.weight": (vision.num_patches + 1, vision.hidden_size),
        "text_model.embeddings.position_embedding.weight": (text.max_position_embeddings, text.hidden_size),
        "vision_decoder.position_embeddings": (1, decoder.num_patches, decoder.hidden_size),
    }
    _compare(path, header.tensors, shapes)


def _not_whole(path: Path, error: Exception) -> InputError:
    remedy = "fetch it again"
    with suppress(OSError), path.open("rb") as file:
        remedy = "run `git lfs pull`" if file.read(8) == b"version " else remedy
    return InputError(f"{str(path)!r} is not a whole safetensors file ({one_line(error)}): {remedy}")


class _Unfilled(TorchFunctionMode):
    """Leaves initialisation out: on the meta device it fills nothing, but imports TorchDynamo, a second's work."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def _image_processor(folder: Path, config: QLIPConfig) -> ImageProcessor | None:
    path, vision = folder / PREPROCESSOR, config.vision
    if not path.exists():
        return None
    processor = ImageProcessor.from_file(path)
    if (processor.resize, processor.crop, vision.image_size, vision.patch_size) == (392, 256, 256, 8):
        # The published B/8's file, a slip: it would show the model the middle two thirds of a picture.
        logger.warning("%s: resizing to 256 pixels before the crop of 256, not to 392 as the file says", path)
        processor = replace(processor, resize=256)
    if processor.size != config.size:
        theirs, ours = (f"{height} × {width}" for height, width in (processor.size, config.size))
        raise InputError(
            f"{str(path)!r} crops to {theirs} pixels, but the model takes {ours}: set its crop_size to that"
        )
    return processor


def _text_tokenizer(folder: Path, config: QLIPConfig) -> TextTokenizer | None:
    tokenizer = TextTokenizer.find(folder, config.text.max_position_embeddings)
    if tokenizer is not None and tokenizer.vocab_size > config.text.vocab_size:
        raise InputError(
            f"{str(folder)!r}: its vocabulary has {tokenizer.vocab_size} ids, but the model embeds "
            f"{config.text.vocab_size}: put the model's own vocabulary there"
        )
    return tokenizer


def save_description(model: QLIP, folder: Path) -> None:
    """Write what is in a checkpoint but the weights: configuration, preprocessing, words."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    (folder / CONFIG).write_text(config, encoding="utf-8")
    for part in (model.image_processor, model.text_tokenizer):
        if part is not None:
            part.save(folder)


def load_description(
    folder: Path,
    name: str = "unnamed",
    image_size: int | Sequence[int] | None = None,
    header: Header | None = None,
) -> QLIP:
    """What `save_description` wrote, as a model whose weights are on the meta device.

    Args:
        folder: where it is.
        name: of the model.
        image_size: as `load` takes it.
        header: of the weights, which the configuration is then compared with before anything is made.

    Raises:
        InputError: a file is broken, `image_size` holds no whole patches, or the weights are of another model.
    """
    config = _read_config(folder / CONFIG)
    if header is not None:
        _check_scale(config, header, folder / WEIGHTS)
    processor, words = read_companions(folder, config)
    if image_size is not None:
        config = config.at_size(image_size)
        processor = processor and processor.at_size(config.size)
    model = skeleton(config, name)
    model.image_processor, model.text_tokenizer = processor, words
    return model


def read_companions(folder: Path, config: QLIPConfig) -> tuple[ImageProcessor | None, TextTokenizer | None]:
    """The image processor and the text vocabulary of a checkpoint's folder; None for what it lacks.

    Raises:
        InputError: a file is broken, or does not fit the configuration.
    """
    return _image_processor(folder, config), _text_tokenizer(folder, config)


def _write(model: QLIP, weights: dict[str, Tensor], folder: Path) -> None:
    save_description(model, folder)
    save_tensors(weights, folder / WEIGHTS, {"format": "pt"})
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
