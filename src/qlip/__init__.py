"""QLIP: text-aligned visual tokens, exact, trainable, fast.

    model = qlip.load("qlip-tiny")
    tokens = model.tokenize("photo.jpg")

Importing this is cheap: PyTorch comes in with the first use.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlip.model.checkpoint import load
    from qlip.model.config import QLIPConfig
    from qlip.model.qlip import QLIP
    from qlip.t2i.pipeline import load_t2i
    from qlip.um3.pipeline import load_um3

    __version__: str

__all__ = ["QLIP", "QLIPConfig", "__version__", "load", "load_t2i", "load_um3"]

_HOMES = {
    "load": "qlip.model.checkpoint",
    "load_t2i": "qlip.t2i.pipeline",
    "load_um3": "qlip.um3.pipeline",
    "QLIP": "qlip.model.qlip",
    "QLIPConfig": "qlip.model.config",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("open-qlip")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
