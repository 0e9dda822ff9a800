"""LLaVA-1.5 with QLIP as its eye: `build` puts one together, `load` reads one back. Needs the extra `llava`.

Importing this is cheap: `transformers` comes in with the first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlip.llava.answers import ask
    from qlip.llava.model import build, load

__all__ = ["ask", "build", "load"]

_HOMES = {"ask": "qlip.llava.answers", "build": "qlip.llava.model", "load": "qlip.llava.model"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
