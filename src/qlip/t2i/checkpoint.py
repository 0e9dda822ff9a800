"""A text-to-image model as a folder: `config.json` and `model.safetensors`."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlip.environment import resolve_device
from qlip.errors import InputError, one_line
from qlip.files import save_tensors
from qlip.guarded import check_layers, read_header, read_json, read_object, typed
from qlip.model.checkpoint import BUNDLED
from qlip.t2i.config import T2IConfig
from qlip.t2i.model import T2I

CONFIG, WEIGHTS, KIND = "config.json", "model.safetensors", "qlip-t2i"


def save(model: T2I, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that `load` reads again, bit for bit.

    Everything is written beside and renamed when it is complete, so that a failure leaves what was there.

    Args:
        model: what to write.
        folder: where.
        dtype: of the weights in the file, such as bfloat16, which halves it; the model's by default.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    weights = {name: value.to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    config = {"model_type": KIND, **asdict(model.config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as beside:
            text, tensors = Path(beside) / CONFIG, Path(beside) / WEIGHTS
            text.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_tensors(weights, tensors, {"format": "pt"})
            for file in (tensors, text):
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(folder)!r} cannot be written ({one_line(error)}): use another folder") from error


def load(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    id_hash: str | None = None,
) -> T2I:
    """Read a folder that `save` wrote.

    Args:
        folder: of the checkpoint, or the name of one that comes with this package.
        device: where the model goes; "auto" takes a GPU if there is one.
        dtype: of the weights, whatever the file has.
        id_hash: the name of the ids that the model must speak of, `QLIP.id_hash()`; None: any.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: there is no such checkpoint, it is not whole, or it is of other ids.
    """
    place, folder = resolve_device(device), find(folder)
    config = read_config(folder)
    if id_hash not in (None, config.id_hash):
        raise InputError(
            f"{str(folder)!r} was trained on ids {config.id_hash} of {config.tokenizer!r}, these are {id_hash}: "
            "use the tokenizer that it was trained with"
        )
    try:
        check_layers(config.lm.num_hidden_layers, read_header(folder / WEIGHTS))
        model = skeleton(config)
        weights = load_file(folder / WEIGHTS)
        model.load_state_dict({name: value.to(place, dtype) for name, value in weights.items()}, assign=True)
    except (OSError, InputError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{str(folder / WEIGHTS)!r} is not the model of its {CONFIG}: {one_line(error)}"
        ) from error
    return model.eval()


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: one that comes with this package, by its name, else a folder."""
    return BUNDLED / str(name) if name in bundled() else Path(name)


def bundled() -> list[str]:
    """Names of the models that come with this package."""
    configs = BUNDLED.glob(f"*/{CONFIG}")
    return sorted(path.parent.name for path in configs if read_json(path).get("model_type") == KIND)


def skeleton(config: T2IConfig) -> T2I:
    """A model whose weights are on the meta device: for `load_state_dict(…, assign=True)`."""
    with torch.device("meta"):
        return T2I(config)


def read_config(folder: Path) -> T2IConfig:
    """The configuration of a folder.

    Raises:
        InputError: it has none, or one of another kind of model.
    """
    path = folder / CONFIG
    try:
        values = read_object(path)
        if values.pop("model_type", None) != KIND:
            raise InputError(f"model_type is not {KIND}")
        return typed(T2IConfig, values)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(folder)!r} is not a text-to-image model ({path.name}: {one_line(error)}): use a bundled one "
            f"({', '.join(bundled()) or 'there is none'}), or a folder such as RUN/model"
        ) from error
