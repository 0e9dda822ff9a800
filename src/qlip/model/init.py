"""Start a model from another's weights: EVA-02-CLIP, EVA-02 masked image modelling, CLIP's words, another QLIP.

A source's keys are renamed to ours (docs/paper.md section 1, "From EVA-CLIP"); what depends on the grid, the patch
or the context is resized; what the source does not have stays as it is. The report says which is which.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlip.errors import InputError, one_line
from qlip.guarded import read_json
from qlip.model.checkpoint import DERIVED
from qlip.model.config import TextConfig
from qlip.model.hub import CONFIG, PICKLES, conversion
from qlip.model.layers import resize_positions
from qlip.model.qlip import QLIP

Source = Literal["eva-clip", "eva-mim", "clip-text", "qlip"]

# The key by which a file is known to be in a source's layout.
_ANCHORS: dict[str, str] = {
    "eva-clip": "visual.cls_token",
    "eva-mim": "cls_token",
    "clip-text": "text_model.embeddings.token_embedding.weight",
    "qlip": "vision_model.quant_embed.c_fc.weight",
}

_BLOCK = r"vision_model.encoder.layers.\1"
_EVA_VISION = {
    r"cls_token": "vision_model.embeddings.class_embedding",
    r"pos_embed": "vision_model.embeddings.position_embedding.weight",
    r"patch_embed\.proj\.(\w+)": r"vision_model.embeddings.patch_embedding.\1",
    r"blocks\.(\d+)\.norm([12])\.(\w+)": rf"{_BLOCK}.layer_norm\2.\3",
    r"blocks\.(\d+)\.attn\.([qkv])_bias": rf"{_BLOCK}.self_attn.\2_proj.bias",
    r"blocks\.(\d+)\.attn\.([qkv]_proj|inner_attn_ln)\.(\w+)": rf"{_BLOCK}.self_attn.\2.\3",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": rf"{_BLOCK}.self_attn.out_proj.\2",
    r"blocks\.(\d+)\.mlp\.(w[123]|ffn_ln|fc[12])\.(\w+)": rf"{_BLOCK}.mlp.\2.\3",
    r"norm\.(\w+)": r"vision_model.post_layernorm.\1",
}
_TEXT_BLOCK = r"text_model.encoder.layers.\1"
_EVA_CLIP = {
    **{rf"visual\.{key}": name for key, name in _EVA_VISION.items()},
    r"visual\.head\.(\w+)": r"visual_projection.\1",
    r"text\.token_embedding\.weight": "text_model.embeddings.token_embedding.weight",
    r"text\.positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"text\.transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)": rf"{_TEXT_BLOCK}.layer_norm\2.\3",
    r"text\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)": rf"{_TEXT_BLOCK}.self_attn.[qkv]_proj.\2",
    r"text\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)": rf"{_TEXT_BLOCK}.self_attn.out_proj.\2",
    r"text\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)": rf"{_TEXT_BLOCK}.mlp.fc1.\2",
    r"text\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)": rf"{_TEXT_BLOCK}.mlp.fc2.\2",
    r"text\.ln_final\.(\w+)": r"text_model.final_layer_norm.\1",
    r"text\.text_projection": "text_projection.weight",
    r"logit_scale": "logit_scale",
}
_RULES: dict[str, dict[str, str]] = {
    "eva-clip": _EVA_CLIP,
    "eva-mim": _EVA_VISION,
    "clip-text": {r"(text_model\..+|text_projection\.\w+)": r"\1"},
    "qlip": {r"(.+)": r"\1"},
}

_NESTING = re.compile(r"(module\.|model\.)*")


@dataclass(frozen=True)
class InitReport:
    """What `init_from` did, by key. `str(report)` sums it up in a few lines.

    Attributes:
        loaded: the model's keys that took the source's values as they are.
        resized: the model's keys that took them resized to another grid, patch or context.
        fresh: the model's keys that the source lacks; they keep the values they had.
        unused: the source's keys that the model has no place for. Rotary tables and the like, which are
            computed and not learned, are not listed.
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        taken = self.loaded + self.resized
        lines = [f"loaded {len(self.loaded)} tensors as they are"]
        lines += _listing("resized", self.resized, map(_any_layer, self.resized))
        lines += _listing("fresh", self.fresh, _whole_parts(self.fresh, taken))
        lines += _listing("unused", self.unused, map(_any_layer, self.unused))
        if any(key.endswith("visual.head.bias") for key in self.unused):
            lines.append("visual.head.bias was dropped: set vision_projection_bias=True to keep it")
        return "\n".join(lines)


def init_from(model: QLIP, path: str | os.PathLike[str], source: Source) -> InitReport:
    """Load what another model learned.

    Positions are resized by bicubic interpolation, and patch kernels so that a resized patch has the
    embedding that it had. Text positions beyond the model's context are left out. "clip-text" leaves
    `logit_scale` alone: it belongs to the picture tower that is not loaded. What no tensor tells must be
    right in the model's config: number of heads, activation (OpenAI's CLIP has "quick_gelu"), eps, rotary
    positions, `eos_token_id` (EVA-CLIP pools at the largest id, which is 2 in a config). Of "clip-text" the
    first three are compared with the `config.json` beside the weights, if there is one.

    Args:
        model: it is changed in place.
        path: a safetensors file, or a folder with one.
        source: the layout of that file.
            "eva-clip": EVA-02-CLIP; pictures, words and `logit_scale`.
            "eva-mim": EVA-02 masked image modelling; the vision encoder.
            "clip-text": `transformers`' CLIPModel or CLIPTextModelWithProjection; the text tower.
            "qlip": a QLIP tokenizer, of any grid and patch.

    Returns:
        Which keys were loaded, resized, left fresh, and which of the source's were unused.

    Raises:
        InputError: the file cannot be read or is not in that layout, or its model has another width, depth or
            configuration. The model is then unchanged.
    """
    if source not in _ANCHORS:
        raise InputError(f"source is {source!r}: use one of {', '.join(get_args(Source))}")
    path = _find_file(Path(path))
    tensors = _read(path)
    _check_layout(path, tensors, source)
    if source == "clip-text":
        _check_config(path.parent / CONFIG, model.config.text)
    sources = {name: (key, tensor) for key in tensors for name, tensor in _rename(key, tensors[key], source)}
    parameters = dict(model.named_parameters())
    values, resized = {}, []
    for name, parameter in parameters.items():
        if name not in sources:
            continue
        key, tensor = sources[name]
        values[name] = _resize(name, tensor, parameter.shape, model.config.decoder.num_channels)
        if values[name].shape != parameter.shape:
            raise InputError(
                f"{str(path)!r}: {key} makes {name} {tuple(tensor.shape)}, but the model's is "
                f"{tuple(parameter.shape)}: build the model with the source's sizes"
            )
        if tensor.shape != parameter.shape:
            resized.append(name)
    _check_blocks(path, sources, parameters)
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    used = {sources[name][0] for name in values}
    return InitReport(
        loaded=tuple(name for name in values if name not in resized),
        resized=tuple(resized),
        fresh=tuple(name for name in parameters if name not in values),
        unused=tuple(key for key in tensors if key not in used and not DERIVED.fullmatch(key)),
    )


# Reading


def _find_file(path: Path) -> Path:
    """The file itself, or the one safetensors file of a folder."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise InputError(f"{str(path)!r} has several safetensors files ({names}): name the one to read")
        path = next(iter(files or _pickles(path)), path / "model.safetensors")
    if not path.is_file():
        raise InputError(f"{str(path)!r} is missing: pass a safetensors file, or a folder with one")
    if path.suffix in PICKLES:
        target = str(path.with_suffix(".safetensors"))
        raise InputError(f"{str(path)!r} is a pickle: {conversion(str(path), target)}")
    return path


def _pickles(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in PICKLES)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{str(path)!r} is not a readable safetensors file ({one_line(error)}): get it again"
        ) from error


def _check_layout(path: Path, keys: Collection[str], source: str) -> None:
    names = {_NESTING.sub("", key, count=1) for key in keys}
    if _ANCHORS[source] in names:
        return
    fitting = [repr(other) for other, anchor in _ANCHORS.items() if anchor in names]
    remedy = f"pass source={' or '.join(fitting)}" if fitting else "check the path"
    raise InputError(
        f"{str(path)!r} is not in the layout {source!r}, it has {min(keys, default='nothing')!r} and the like "
        f"but no {_ANCHORS[source]!r}: {remedy}"
    )


def _check_config(path: Path, ours: TextConfig) -> None:
    """Whether the model computes with CLIP's text weights what CLIP does: no tensor tells its activation."""
    if not path.is_file():
        return
    try:
        values = read_json(path)
        theirs = values.get("text_config", values)
        found = {name: theirs[name] for name in ("num_attention_heads", "layer_norm_eps") if name in theirs}
        found["hidden_act"] = theirs.get("hidden_act", "quick_gelu")  # transformers' default
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} is not CLIP's configuration ({one_line(error)}): fetch it again"
        ) from error
    for name, value in found.items():
        if value != getattr(ours, name):
            option = f"--model.text.{name.replace('_', '-')} {value}"
            raise InputError(
                f"{str(path)!r}: CLIP's text encoder has {name} {value!r}, this model's has "
                f"{getattr(ours, name)!r}, "
                f"and would compute other embeddings: pass {option}"
            )


def _check_blocks(path: Path, sources: Collection[str], parameters: Mapping[str, Tensor]) -> None:
    """A tower that the source has must have its depth, and every matrix; biases and norms may be fresh."""
    theirs, ours = _num_layers(sources), _num_layers(parameters)
    for tower in theirs.keys() & ours.keys():
        if theirs[tower] != ours[tower]:
            raise InputError(
                f"{str(path)!r} has {theirs[tower]} layers in {tower}, but the model has {ours[tower]}: "
                "build the model with the source's depth"
            )
    for name, parameter in parameters.items():
        if parameter.ndim == 2 and _tower(name) in theirs and name not in sources:
            raise InputError(
                f"{str(path)!r} has nothing for the model's {name}: build the model with the source's kind of "
                "block (swiglu), or get the whole file"
            )


def _num_layers(names: Iterable[str]) -> dict[str, int]:
    """How many layers each tower has, by its prefix."""
    depths: dict[str, int] = {}
    for name in names:
        if tower := _tower(name):
            depths[tower] = max(depths.get(tower, 0), int(name.removeprefix(tower).split(".")[1]) + 1)
    return depths


def _tower(name: str) -> str | None:
    """The prefix of a tower's layers, if the name is of one."""
    match = re.match(r"\w+\.encoder\.layers(?=\.\d+\.)", name)
    return match[0] if match else None


def _rename(key: str, tensor: Tensor, source: str) -> Iterator[tuple[str, Tensor]]:
    """Our names for one tensor of a source, each with its values in our shape."""
    plain = _NESTING.sub("", key, count=1)
    for pattern, replacement in _RULES[source].items():
        if match := re.fullmatch(pattern, plain):
            name = match.expand(replacement)
            break
    else:
        return
    if "[qkv]" in name:
        for letter, part in zip("qkv", tensor.chunk(3), strict=False):
            yield name.replace("[qkv]", letter), part
    elif plain == "text.text_projection":
        yield name, tensor.T
    elif plain.endswith(("cls_token", "pos_embed")):
        yield name, tensor.squeeze()
    else:
        yield name, tensor


# Resizing


def _resize(name: str, tensor: Tensor, shape: torch.Size, num_channels: int) -> Tensor:
    """Fit what depends on grid, patch or context into `shape`; anything else comes back as it is."""
    if tensor.ndim != len(shape) or tensor.shape == shape:
        return tensor
    if name == "text_model.embeddings.position_embedding.weight":
        return tensor[: shape[0]]
    if name == "vision_model.embeddings.position_embedding.weight":
        return torch.cat((tensor[:1], _resize_positions(tensor[1:], shape[0] - 1)))
    if name == "vision_decoder.position_embeddings":
        return _resize_positions(tensor[0], shape[1])[None]
    if name == "vision_model.embeddings.patch_embedding.weight" and tensor.shape[2] == tensor.shape[3]:
        return _resize_kernels(tensor, shape[-1])
    if name.startswith("vision_decoder.conv_out."):
        return _resize_output(tensor, shape[0], num_channels)
    return tensor


def _resize_positions(positions: Tensor, num_patches: int) -> Tensor:
    """(N, D) of a square grid → (num_patches, D) float32; what is no square stays."""
    old, new = _side(len(positions)), _side(num_patches)
    if old == 0 or old**2 != len(positions):
        return positions
    return resize_positions(positions.float(), (old, old), (new, new))


def _resize_kernels(kernels: Tensor, patch_size: int) -> Tensor:
    """(D, C, p, p) → (D, C, patch_size, patch_size) float32, by the pseudo-inverse of the patches' resize.

    If x is a patch and Bx the same in another size, the kernel w' that gives ⟨w', Bx⟩ = ⟨w, x⟩ is
    pinv(Bᵀ)·w (FlexiViT, arXiv 2212.08013): exact when patches grow, the nearest there is when they shrink.
    Interpolating the kernels themselves, as EVA does, would multiply the embeddings by the ratio of areas.
    """
    matrix = _resize_matrix(kernels.shape[-1], patch_size)
    return (kernels.double().flatten(2) @ torch.linalg.pinv(matrix)).float().unflatten(2, (patch_size, -1))


def _resize_output(tensor: Tensor, num_pixels: int, num_channels: int) -> Tensor:
    """(C·p·p, ...) → (num_pixels, ...) float32: what made a patch makes it resized, so bicubic itself is right."""
    old, new = _side(len(tensor) // num_channels), _side(num_pixels // num_channels)
    if num_channels * old**2 != len(tensor):
        return tensor
    patches = tensor.double().reshape(num_channels, old**2, -1)
    return (_resize_matrix(old, new) @ patches).float().reshape(num_pixels, *tensor.shape[1:])


def _resize_matrix(old: int, new: int) -> Tensor:
    """(new², old²) float64: bicubic resizing of a square, as PIL does it and so as `ImageProcessor` does."""
    basis = torch.eye(old**2, dtype=torch.float64).view(-1, 1, old, old)
    return F.interpolate(basis, size=(new, new), mode="bicubic", antialias=True).flatten(1).T


def _side(area: int) -> int:
    return round(area**0.5)


# Reporting


def _whole_parts(keys: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """Shorten `tower.a.b` to `tower.*`, or to `tower.a.*`, where none of the others begins so."""
    taken = {".".join(other.split(".")[:depth]) for other in others for depth in (1, 2)}
    for key in keys:
        parts = key.split(".")
        wholes = (".".join(parts[:depth]) for depth in (1, 2) if depth < len(parts))
        whole = next((whole for whole in wholes if whole not in taken), None)
        yield f"{whole}.*" if whole else _any_layer(key)


def _any_layer(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _listing(title: str, keys: Iterable[str], names: Iterable[str], most: int = 12) -> list[str]:
    """A title, then a line for each group of keys of one name, with their number; at most so many lines."""
    groups: dict[str, list[str]] = {}
    for key, name in zip(keys, names, strict=True):
        groups.setdefault(name, []).append(key)
    lines = [f"  {name} ({len(group)})" if len(group) > 1 else f"  {group[0]}" for name, group in groups.items()]
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return [f"{title}:", *lines[:most], *more] if lines else []
