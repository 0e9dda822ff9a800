"""What UM3 knows of language: its text view, in lm-eval."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlip.errors import InputError
from qlip.eval.language import evaluate_language
from qlip.eval.options import LanguageOptions

UM3_FILE = "um3.json"


def evaluate_um3_text(model: str, options: LanguageOptions) -> dict[str, Any]:
    """Measure the language of a model; see `qlip.eval.language`.

    Args:
        model: folder of a UM3, or any causal language model that transformers can load.
        options: tasks, documents, device.

    Returns:
        what stands in results.json.
    """
    path = Path(model)
    name = path.resolve().parent.name if path.is_dir() and path.resolve().name == "model" else path.name
    with text_view(model) as folder:
        return evaluate_language(folder, options, name)


@contextmanager
def text_view(model: str) -> Iterator[str]:
    """A model that any harness can load: of a UM3 the stock one without visual rows, in a temporary folder.

    Raises:
        InputError: a UM3, whose text view cannot be written yet.
    """
    if (Path(model) / UM3_FILE).exists():
        raise InputError(f"{model} is a UM3: give the folder of its text view")
    yield model
