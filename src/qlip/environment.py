"""The device to compute on; hardware, versions, commit and command for whatever reports numbers."""

import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from qlip.errors import InputError, one_line


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to compute on.

    Args:
        device: a torch device, or "auto": a GPU if there is one, which the log then says, else the CPU.

    Raises:
        InputError: this PyTorch, or this machine, does not have it.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = "cuda"
        logging.getLogger("qlip").info("computing on %s", torch.cuda.get_device_name())
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        reason = one_line(error).split(". ")[0]  # PyTorch goes on for pages
        raise InputError(f"device={str(device)!r} is not to be had ({reason}): use 'cpu'") from error


def environment(device: str) -> dict[str, str]:
    """Describe what a number was measured on.

    Args:
        device: a torch device, such as "cpu" or "cuda".
    """
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout if shutil.which("git") else ""
    cuda = torch.device(device).type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(device) if cuda else f"{os.cpu_count()} CPU cores ({_cpu()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open-qlip": version("open-qlip"),
        "commit": commit.strip() or "unknown",
    }


def command() -> str:
    """The command that runs, as a person types it; of absolute paths the name, since places are private."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    if program.name == "qlip":
        start = "qlip"
    elif program.name == "__main__.py":
        start = "python -m qlip.cli"
    else:
        start = f"python {Path(*program.parts[-2:])}"
    return f"{start} {shlex.join(Path(a).name if Path(a).is_absolute() else a for a in arguments)}".rstrip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
