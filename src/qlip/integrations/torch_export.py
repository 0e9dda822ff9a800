"""A tokenizer as `torch.export` programs: PyTorch runs them without this package, AOTInductor compiles them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlip.integrations.parts import Agreement, Part, Run, write_export
from qlip.model.qlip import QLIP

FORMAT, SUFFIX = "torch-export", ".pt2"


def export(model: QLIP, out: Path) -> Agreement:
    """Write `encoder.pt2`, `decoder.pt2` and `text.pt2`, each checked against the model.

    What they take and give, `qlip.integrations.parts` says.

    Args:
        model: in float32 on the CPU.
        out: folder, made if need be.

    Raises:
        InputError: the model cannot be exported, or the folder not be written.
    """
    return write_export(model, out, FORMAT, SUFFIX, _write, _open, {})


def _write(part: Part, path: Path) -> None:
    torch.export.save(part.program(), path)


def _open(path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(inputs: Tensor) -> Sequence[Tensor]:
        outputs = module(inputs)
        return [outputs] if isinstance(outputs, Tensor) else outputs

    return run
