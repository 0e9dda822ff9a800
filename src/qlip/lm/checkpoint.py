"""Checkpoints of Hugging Face's layout in and out: Llama, and Qwen3 for models with QK-norm.

A checkpoint is a folder: `config.json`, and `model.safetensors` or shards of it with an index. The files of a
tokenizer beside them are not read here, and only written if they are handed over.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlip.environment import resolve_device
from qlip.errors import InputError, one_line
from qlip.files import save_tensors
from qlip.guarded import Header, TensorInfo, check_layers, inside, read_header, read_object, typed, weight_files
from qlip.lm.config import LMConfig, RopeScaling
from qlip.lm.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHARD_BYTES = 5 * 10**9
STORED = ("F32", "BF16", "F16", "F64")  # dtypes of weights, as files spell them
T = TypeVar("T")

_SHARED = (  # fields of the same name in the file, whose absence means the same
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
_FIXED = {  # switches of theirs that we have in one position only
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
_DERIVED = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # tables in old files, no weights
_WRITTEN = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def load(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Load a Llama or a Qwen3.

    Args:
        folder: of the checkpoint.
        device: where the model goes; "auto" takes a GPU if there is one.
        dtype: of the weights.

    Returns:
        The model in evaluation mode, without dropout, which no such checkpoint has.

    Raises:
        InputError: there is no checkpoint, it is of another architecture, or is not whole; names file and key.
    """
    place, folder = resolve_device(device), Path(folder)
    config, headers = read_config(folder), _read_headers(folder)
    try:
        check_layers(config.num_hidden_layers, headers)
    except InputError as error:
        raise InputError(f"{str(folder)!r}: {error}: take its {CONFIG} and weights from one place") from error
    model = skeleton(config)
    _compare(folder, _ours(headers.tensors, model), model.state_dict())
    found = _ours(_read_weights(folder), model)
    model.load_state_dict({key: value.to(place, dtype) for key, value in found.items()}, assign=True)
    return model.eval()


def save(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    companions: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint that `load` and `transformers` read: a Llama, or with QK-norm a Qwen3.

    Everything is written beside and renamed when it is complete, so that a failure leaves what was there.

    Args:
        model: on any device. Dropout is not written.
        folder: made if need be; the weights and the configuration of a checkpoint that is there are replaced.
        dtype: of the weights in the file; the model's by default.
        companions: names and contents of further files that appear with it.
        shard_bytes: the most in one file, but for a tensor that is larger; the rest goes into further ones.

    Raises:
        InputError: the model is neither, or the folder cannot be written.
    """
    config = config_to_dict(model.config) | {"dtype": str(dtype or model.dtype).removeprefix("torch.")}
    weights = {
        _theirs(key): value.detach().to("cpu", dtype).contiguous() for key, value in model.state_dict().items()
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as beside:
            _write(Path(beside), config, weights, shard_bytes)
            for name, text in (companions or {}).items():
                (Path(beside) / name).write_text(text, encoding="utf-8")
            written = {new.name: new for new in Path(beside).iterdir()}
            for name, new in sorted(written.items()):
                new.replace(folder / name)
            for old in [path for path in folder.iterdir() if _WRITTEN.fullmatch(path.name)]:
                if old.name not in written:  # shards, or the one file, of what was there
                    old.unlink()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(folder)!r} cannot be written ({one_line(error)}): use another folder") from error


def skeleton(config: LMConfig) -> Transformer:
    """A model whose weights are on the meta device: for `load_state_dict(…, assign=True)`."""
    with torch.device("meta"):
        return Transformer(config)


def read_config(folder: Path) -> LMConfig:
    """The configuration of a checkpoint.

    Raises:
        InputError: there is none, or it is of a model that this is not.
    """
    path = folder / CONFIG
    try:
        return config_from_dict(read_object(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a usable model configuration: {one_line(error)}") from error


def config_from_dict(values: dict[str, Any]) -> LMConfig:
    """The configuration from a `config.json` of transformers 4 or 5.

    Raises:
        InputError: it is of another architecture, or sets a switch that we do not have; names it.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(f"model_type is {kind!r:.60}: only {' and '.join(ARCHITECTURES)} checkpoints are read")
    for name, ours in _FIXED.items():
        if values.get(name, ours) != ours:
            raise InputError(f"{name} is {values[name]!r}: only checkpoints with {ours!r} are read")
    found = {name: values[name] for name in _SHARED if name in values}
    if kind == "qwen3":
        found.setdefault("head_dim", 128)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = typed(dict[str, Any], rope, "rope_parameters")
    theta = rope.get("rope_theta", values.get("rope_theta", LMConfig.rope_theta))
    return typed(
        LMConfig, found | {"rope_theta": theta, "rope_scaling": _rope_scaling(rope), "qk_norm": kind == "qwen3"}
    )


def config_to_dict(config: LMConfig) -> dict[str, Any]:
    """The `config.json` that transformers 4 and 5 read.

    Raises:
        InputError: neither architecture has what the model has.
    """
    if config.rope_axes != 1 or config.num_slots:
        raise InputError(
            f"rope_axes {config.rope_axes} with num_slots {config.num_slots} is neither Llama nor Qwen3: "
            "only models with 1 and 0 are written in this layout"
        )
    kind = "qwen3" if config.qk_norm else "llama"
    values = {name: getattr(config, name) for name in _SHARED}
    values |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}
    scaling = config.rope_scaling and {"rope_type": "llama3", **asdict(config.rope_scaling)}
    rope = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    return {"architectures": [ARCHITECTURES[kind]], "model_type": kind, **values, **rope, **_FIXED}


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"rope_type is {kind!r}: only checkpoints with 'default' or 'llama3' are read")
    if missing := [field.name for field in fields(RopeScaling) if field.name not in rope]:
        raise InputError(f"rope_parameters has no {missing[0]!r}")
    return {field.name: rope[field.name] for field in fields(RopeScaling)}


def _theirs(key: str) -> str:
    return key if key.startswith("lm_head.") else f"model.{key}"


def _files(folder: Path) -> list[Path]:
    """The files of the weights."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    with _whole(folder / INDEX):
        return [inside(folder, name) for name in weight_files(folder / INDEX)]


def _read_headers(folder: Path) -> Header:
    """The headers of all files, as one."""
    together = Header({}, {})
    for path in _files(folder):
        with _whole(path):
            header = read_header(path)
            together.tensors.update(header.tensors)
            together.metadata.update(header.metadata)
    return together


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files, mapped."""
    weights: dict[str, Tensor] = {}
    for path in _files(folder):
        with _whole(path):
            weights.update(load_file(path))
    return weights


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, InputError, SafetensorError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read ({one_line(error)}): weights must be whole safetensors files, such as "
            "`save_pretrained` of transformers writes"
        ) from error


def _ours(found: Mapping[str, T], model: Transformer) -> dict[str, T]:
    """Tensors by the names that the model has for them."""
    found = {key.removeprefix("model."): value for key, value in found.items()}
    twice = {"lm_head.weight"} if model.lm_head is None else set()  # some files have the embedding twice
    return {key: value for key, value in found.items() if not _DERIVED.fullmatch(key) and key not in twice}


def _compare(folder: Path, found: dict[str, TensorInfo], wanted: dict[str, Tensor]) -> None:
    both = [key for key in wanted if key in found]
    problems = {
        "it lacks": [_theirs(key) for key in wanted if key not in found],
        "it has besides": [_theirs(key) for key in found if key not in wanted],
        "shapes differ:": [
            f"{_theirs(key)} is {found[key].shape}, not {tuple(wanted[key].shape)}"
            for key in both
            if found[key].shape != wanted[key].shape
        ],
        "these are no weights:": [
            f"{_theirs(key)} is {found[key].dtype}" for key in both if found[key].dtype not in STORED
        ],
    }
    if text := "; ".join(f"{problem} {_some(keys)}" for problem, keys in problems.items() if keys):
        raise InputError(
            f"{str(folder)!r} does not hold the model of its {CONFIG}, take both from one place: {text}"
        )


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shard_bytes: int) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards, places = _in_shards(weights, shard_bytes), {}
    for i, keys in enumerate(shards, 1):
        path = folder / (f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS)
        save_tensors({key: weights[key] for key in keys}, path, {"format": "pt"})
        places.update(dict.fromkeys(keys, path.name))
    if len(shards) > 1:
        size = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_shards(weights: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """The keys in order, in groups of at most so many bytes, or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, value in weights.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += value.nbytes
    return shards


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
