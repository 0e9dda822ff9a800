"""A tokenizer as three programs for other people's runtimes: encoder, decoder, text tower; written and checked.

    encoder    pixel_values (B, 3, H, W)  →  tokens (B, N), latents (B, N, L), image_embeds (B, P)
    decoder    tokens (B, N)              →  images (B, 3, H, W) in [0, 1]
    text       input_ids (T, S)           →  text_embeds (T, P)

H × W is the model's `config.size` and S its context; B and T are free. A format (`onnx.py`, `torch_export.py`)
says how a program becomes a file and how that is run; what the file computes is compared with the model before it
stays.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qlip.bits import pack, unpack
from qlip.errors import InputError, one_line
from qlip.files import checksum
from qlip.guarded import inside, read_object, typed
from qlip.model.checkpoint import save_description
from qlip.model.hub import EXPORT
from qlip.model.qlip import QLIP

NEAR_ZERO = 1e-5  # of a latent: another runtime sums in another order and may turn its bit
TOLERANCE = 1e-3  # of everything that is no integer: a quarter of a step of 8 bits
BATCH_SIZES = (1, 3)  # the programs are made from a batch of 2

FORMAT_VERSION = 1

ENCODED = ("tokens", "latents", "image_embeds")

Run = Callable[[Tensor], Sequence[Tensor]]
"""From a program's input to its outputs."""


class Encoder(nn.Module):
    """Pictures to tokens."""

    def __init__(self, model: QLIP):
        super().__init__()
        self.model = _without(model, "vision_decoder", "text_model", "text_projection")
        self.model.vision_model = _without(model.vision_model, "quant_embed_post")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) normalised → tokens (B, N) int64, latents (B, N, L), image_embeds (B, P)."""
        hidden = self.model.hidden_states(pixel_values)
        latents = self.model.compress(hidden[:, 1:])
        bits = (latents > 0).long()
        tokens = torch.zeros_like(bits[..., 0])
        for bit in bits.unbind(-1):  # not a sum over bits: on CUDA, ONNX Runtime's passes through float32
            tokens = tokens * 2 + bit
        return tokens, latents, self.model.project(hidden[:, 0])


class Decoder(nn.Module):
    """Tokens to pictures. Ids are not checked: of what is out of range the lower L bits count."""

    def __init__(self, model: QLIP):
        super().__init__()
        others = (name for name, _ in model.vision_model.named_children() if name != "quant_embed_post")
        self.model = _without(model, "text_model", "text_projection", "visual_projection")
        self.model.vision_model = _without(model.vision_model, *others)
        self.denormalize = model.need_image_processor().denormalize

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) int64 → (B, 3, H, W) in [0, 1]."""
        num_bits = self.model.config.num_bits
        shifts = torch.arange(num_bits - 1, -1, -1, device=tokens.device)
        bits = torch.bitwise_right_shift(tokens[..., None], shifts) & 1
        codes = (bits * 2 - 1).to(self.model.dtype) * num_bits**-0.5
        return self.denormalize(self.model.decode(codes))


class Text(nn.Module):
    """Words to embeddings."""

    def __init__(self, model: QLIP):
        super().__init__()
        self.model = _without(model, "vision_model", "vision_decoder", "visual_projection")

    def forward(self, input_ids: Tensor) -> Tensor:
        """(T, S) ids, each row with its end token → text_embeds (T, P)."""
        return self.model.encode_text(input_ids)


def _without(module: nn.Module, *names: str) -> Any:
    """The same module, weights and all, but for some of its parts: a program would store them."""
    lighter = copy.copy(module)
    lighter._modules = {name: part for name, part in module._modules.items() if name not in names}
    return lighter


@dataclass(frozen=True)
class Part:
    """One of the three programs.

    Attributes:
        name: "encoder", "decoder" or "text".
        module: what becomes the program.
        input: name of its input.
        outputs: names of its outputs.
        sample: makes a random input of some batch size.
        reference: the model's own way from input to outputs.
    """

    name: str
    module: nn.Module
    input: str
    outputs: tuple[str, ...]
    sample: Callable[[int], Tensor]
    reference: Run

    @torch.no_grad()
    def program(self) -> ExportedProgram:
        """The program, for any batch size."""
        free = {self.input: {0: Dim("batch")}}
        return torch.export.export(self.module, (self.sample(2),), dynamic_shapes=free, strict=False)


def parts(model: QLIP) -> list[Part]:
    """The programs of a tokenizer.

    Raises:
        InputError: it has no image processor.
    """
    config, context = model.config, model.config.text.max_position_embeddings
    generator = torch.Generator().manual_seed(0)

    def pixel_values(size: int) -> Tensor:
        return torch.randn(size, config.vision.num_channels, *config.size, generator=generator)

    def tokens(size: int) -> Tensor:
        return pack(torch.randint(2, (size, config.num_tokens, config.num_bits), generator=generator))

    def input_ids(size: int) -> Tensor:
        ids = torch.randint(config.text.vocab_size, (size, context), generator=generator)
        ids[:, -1] = config.text.eos_token_id
        return ids

    def encode(pixels: Tensor) -> Sequence[Tensor]:
        latents = model.encode(pixels)
        return model.codes_to_tokens(model.quantize(latents)), latents, model.encode_image(pixels)

    return [
        Part("encoder", Encoder(model), "pixel_values", ENCODED, pixel_values, encode),
        Part("decoder", Decoder(model), "tokens", ("images",), tokens, lambda ids: [model.detokenize(ids)]),
        Part("text", Text(model), "input_ids", ("text_embeds",), input_ids, lambda ids: [model.encode_text(ids)]),
    ]


@dataclass
class Agreement:
    """How far a written program and the model agree, on random inputs in float32.

    Attributes:
        num_bits: compared.
        num_near_zero: those whose latent lies within `NEAR_ZERO` of zero.
        num_different: those of these that differ; of the others none does.
        errors: largest difference of each output that is no integer.
    """

    num_bits: int
    num_near_zero: int
    num_different: int
    errors: dict[str, float]

    def describe(self) -> str:
        """For a person, on one line."""
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return (
            f"{self.num_bits:,} bits agree, but for {self.num_different} of the {self.num_near_zero} whose latent "
            f"lies within {NEAR_ZERO:g} of zero; of the rest the largest differences are: {errors}"
        )


@torch.no_grad()
def compare(part: Part, run: Run, agreement: Agreement) -> None:
    """Add to an agreement how a program that was written compares with the model.

    Raises:
        InputError: they disagree.
    """
    for inputs in map(part.sample, BATCH_SIZES):
        expected = dict(zip(part.outputs, part.reference(inputs), strict=True))
        found = dict(zip(part.outputs, run(inputs), strict=True))
        if "tokens" in expected:
            _compare_tokens(expected.pop("tokens"), found.pop("tokens"), expected["latents"], agreement)
        for name, values in expected.items():
            error = (values - found[name]).abs().max().item()
            if not error <= TOLERANCE:  # NaN is none
                raise InputError(
                    f"the exported {part.name} gives {name} that are off by {error:.2g}, more than {TOLERANCE:g}: "
                    f"use other versions of the runtime and of PyTorch ({torch.__version__})"
                )
            agreement.errors[name] = max(error, agreement.errors.get(name, 0.0))


def _compare_tokens(expected: Tensor, found: Tensor, latents: Tensor, agreement: Agreement) -> None:
    num_bits = latents.shape[-1]
    differ = unpack(expected, num_bits) != unpack(found, num_bits)
    near_zero = latents.abs() <= NEAR_ZERO
    if wrong := int((differ & ~near_zero).sum()):
        largest = latents[differ].abs().max().item()
        raise InputError(
            f"the exported encoder gives {wrong} of {differ.numel()} bits wrong, where latents are as far as "
            f"{largest:.2g} from zero: use other versions of the runtime and of PyTorch ({torch.__version__})"
        )
    agreement.num_bits += differ.numel()
    agreement.num_near_zero += int(near_zero.sum())
    agreement.num_different += int(differ.sum())


def write_export(
    model: QLIP,
    out: Path,
    format: str,
    suffix: str,
    write: Callable[[Part, Path], None],
    open_part: Callable[[Path], Run],
    versions: Mapping[str, Any],
) -> Agreement:
    """Write the three programs, check them, and put beside them what else an application needs.

    That is the checkpoint's description (`config.json`, `preprocessor_config.json`, the vocabulary) and
    `export.json`, which says what all this is. The files get their names when everything is there and checked.

    Args:
        model: in float32 on the CPU.
        out: folder, made if need be.
        format: of the programs.
        suffix: of their files.
        write: makes a file of a program.
        open_part: opens a file again.
        versions: of what made them, besides PyTorch and this package.

    Raises:
        InputError: the model has another dtype or device, or no image processor; the programs do not agree with
            it; or the folder cannot be written.
    """
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise InputError(f"the model is in {model.dtype} on {model.device}: load it in float32 on the CPU")
    programs, agreement = parts(model), Agreement(0, 0, 0, {})
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as folder:
            beside = Path(folder)
            for part in programs:
                write(part, beside / f"{part.name}{suffix}")
                compare(part, open_part(beside / f"{part.name}{suffix}"), agreement)
            sums = {path.name: checksum(path) for path in sorted(beside.iterdir())}
            save_description(model, beside)
            description = _describe(model, format, sums, agreement, versions)
            (beside / EXPORT).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            (out / EXPORT).unlink(missing_ok=True)  # while files of two exports lie there, it is none
            for path in sorted(beside.iterdir(), key=lambda path: path.name == EXPORT):
                os.replace(path, out / path.name)
    except OSError as error:
        raise InputError(f"{str(out)!r} cannot be written ({one_line(error)}): use another folder") from error
    return agreement


def _describe(
    model: QLIP, format: str, sums: dict[str, str], agreement: Agreement, versions: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format": format,
        "format_version": FORMAT_VERSION,
        "model": model.name,
        "id_hash": model.id_hash(),
        "bits": model.config.num_bits,
        "grid": list(model.config.grid),
        "logit_scale": model.logit_scale.item(),
        "sha256": sums,
        "agreement": asdict(agreement),
        "versions": {"open-qlip": version("open-qlip"), "torch": torch.__version__, **versions},
    }


@dataclass(frozen=True)
class _Export:
    """The fields of an `export.json` that are used here and by who runs the programs."""

    format: str
    format_version: int
    sha256: dict[str, str]
    model: str
    id_hash: str
    bits: int
    grid: tuple[int, int]
    logit_scale: float


def read_export(folder: str | Path, format: str) -> dict[str, Any]:
    """Read the `export.json` of a folder.

    Raises:
        InputError: it is not there, damaged, of another format or of a later version, or a program is not the one
            that it tells of.
    """
    path = Path(folder) / EXPORT
    make = f"make one with `qlip export MODEL --format {format} --out DIR`, and name DIR"
    try:
        found = read_object(path)
        export = typed(_Export, found, unknown="ignore")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{str(folder)!r} holds no export ({EXPORT}): {make}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is damaged ({one_line(error)}): {make}") from error
    if export.format_version > FORMAT_VERSION:
        raise InputError(
            f"{str(path)!r}: version {export.format_version} of exports is newer than this open-qlip: upgrade"
        )
    if export.format != format:
        raise InputError(f"{str(folder)!r} holds an export for {export.format}, not for {format}: {make}")
    for name, sha256 in export.sha256.items():
        file = inside(path.parent, name)
        if not file.is_file() or checksum(file) != sha256:
            raise InputError(f"{str(file)!r} is not the file of this export: {make}")
    return found
