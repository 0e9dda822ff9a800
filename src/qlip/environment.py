"""Hardware, versions and commit, for whatever reports numbers."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def environment(device: str) -> dict[str, str]:
    """Describe what a number was measured on.

    Args:
        device: a torch device, such as "cpu" or "cuda".
    """
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    cuda = torch.device(device).type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(device) if cuda else f"{os.cpu_count()} CPU cores ({_cpu()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open-qlip": version("open-qlip"),
        "commit": commit or "unknown",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
