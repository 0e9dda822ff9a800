"""A tokenizer as ONNX, and its encoder on ONNX Runtime. The one file that imports these (extra `export`)."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.errors import InputError, MissingExtra, one_line
from qlip.integrations.parts import Agreement, Part, Run, read_export, write_export
from qlip.model.checkpoint import load_description
from qlip.model.qlip import QLIP, check_latents

FORMAT, SUFFIX = "onnx", ".onnx"
OPSET = 18  # the first with Col2Im, which puts patches together
MAX_BYTES = 2_000_000_000  # of weights inside an .onnx file: Protocol Buffers end at 2 GiB
LEAST = {"onnx": (1, 17), "onnxscript": (0, 3), "onnxruntime": (1, 20)}
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
GPU = "install onnxruntime-gpu in place of onnxruntime, with the CUDA and cuDNN that it asks for"

logger = logging.getLogger("qlip")


def export(model: QLIP, out: Path) -> Agreement:
    """Write `encoder.onnx`, `decoder.onnx` and `text.onnx`, each checked against the model on ONNX Runtime.

    Weights of more than 2 GB lie beside a program, in `NAME.onnx.data`. See `qlip.integrations.parts`.

    Args:
        model: in float32 on the CPU.
        out: folder, made if need be.

    Raises:
        InputError: a library is missing or too old, the model cannot be exported, or the folder not be written.
    """
    with _present():
        import onnx
        import onnxscript
    libraries = [_recent(library) for library in (onnx, onnxscript, _runtime())]
    versions = {library.__name__: library.__version__ for library in libraries}
    return write_export(model, out, FORMAT, SUFFIX, _write, _open, versions | {"opset": OPSET})


@dataclass(frozen=True)
class OnnxEncoder:
    """An exported encoder, opened.

    Attributes:
        description: its model's configuration, image processor and words, without weights.
        id_hash: name of its ids.
        used: what computes: ONNX Runtime's version and the kind of its device.
        run: (B, 3, H, W) float32 → tokens (B, N).
    """

    description: QLIP
    id_hash: str
    used: dict[str, str]
    run: Callable[[Tensor], Tensor]

    @classmethod
    def open(cls, folder: str | Path, device: str = "auto") -> "OnnxEncoder":
        """Open the encoder of a folder that `export` wrote.

        Args:
            folder: the folder.
            device: "cuda" (under `torchrun` the GPU of the local rank), "cpu", or "auto": a GPU if this ONNX
                Runtime has one. The log says what computes.

        Raises:
            InputError: ONNX Runtime is missing or lacks the device, or this is no such folder.
        """
        runtime, found = _runtime(), read_export(folder, FORMAT)
        session = _session(Path(folder) / f"encoder{SUFFIX}", device)
        provider = session.get_providers()[0]
        logger.info("computing on ONNX Runtime's %s", provider)

        def run(pixel_values: Tensor) -> Tensor:
            tokens, latents = session.run(["tokens", "latents"], {"pixel_values": pixel_values.numpy()})
            check_latents(torch.from_numpy(latents), found["model"])
            return torch.from_numpy(tokens)

        used = {"onnxruntime": runtime.__version__, "device": provider}
        return cls(load_description(Path(folder), found["model"]), found["id_hash"], used, run)


def _write(part: Part, path: Path) -> None:
    num_bytes = sum(weight.nbytes for weight in part.module.parameters())
    with _quiet():
        program = torch.onnx.export(
            part.program(),
            input_names=[part.input],
            output_names=part.outputs,
            dynamic_shapes={part.input: {0: "batch"}},
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # what it gives without a file
    program.save(path, external_data=num_bytes > MAX_BYTES)


def _open(path: Path) -> Run:
    session = _session(path, "cpu")
    (given,) = session.get_inputs()

    def run(inputs: Tensor) -> Sequence[Tensor]:
        outputs: list[np.ndarray] = session.run(None, {given.name: inputs.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return run


def _session(path: Path, device: str) -> Any:
    """A session of ONNX Runtime, with as many threads as PyTorch has."""
    runtime = _runtime()
    is_there = CUDA in runtime.get_available_providers()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not is_there):
        raise InputError(f"device={device!r} is not to be had of this ONNX Runtime: use 'cpu', or {GPU}")
    # TF32 has 10 bits: it would turn many a bit of the ids.
    gpu = (CUDA, {"device_id": os.environ.get("LOCAL_RANK", "0"), "use_tf32": "0"})
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(path, options, [gpu, CPU] if is_there and device != "cpu" else [CPU])
    except Exception as error:  # a class of its own for each kind
        raise InputError(
            f"{str(path)!r} cannot be opened by ONNX Runtime {runtime.__version__} ({one_line(error)[:300]}): "
            "export it again, or upgrade onnxruntime"
        ) from error
    if device == "cuda" and CUDA not in session.get_providers():  # it goes on without
        raise InputError(f"ONNX Runtime finds no GPU that it can use: pass --device cpu, or {GPU}")
    return session


def _runtime() -> Any:
    with _present():
        import onnxruntime
    return _recent(onnxruntime)


@contextmanager
def _present() -> Iterator[None]:
    """Name the extra of what is not there."""
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"ONNX needs the library `{error.name}`: pip install 'open-qlip[export]'") from error


def _recent(library: ModuleType) -> ModuleType:
    """The library, if it is not too old."""
    least = LEAST[library.__name__]
    if tuple(map(int, library.__version__.split(".")[:2])) < least:
        raise InputError(
            f"{library.__name__} is {library.__version__}, ONNX needs {'.'.join(map(str, least))} or later: "
            "pip install --upgrade 'open-qlip[export]'"
        )
    return library


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of torchvision, which is not there, and of PyTorch's own old ways."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
