"""What UM3 knows of language: its text view, in lm-eval."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlip.eval.language import evaluate_language
from qlip.eval.options import LanguageOptions
from qlip.model.checkpoint import called
from qlip.um3.checkpoint import find, is_um3, load, open_tokenizer, save_text


def evaluate_um3_text(model: str, options: LanguageOptions) -> dict[str, Any]:
    """Measure the language of a model; see `qlip.eval.language`.

    Args:
        model: a UM3, bundled or its folder, or any causal language model that transformers can load.
        options: tasks, documents, device.

    Returns:
        what stands in results.json.
    """
    with text_view(model) as folder:
        return evaluate_language(folder, options, called(model))


@contextmanager
def text_view(model: str) -> Iterator[str]:
    """A model that any harness can load: of a UM3 the stock one without visual rows, in a temporary folder."""
    if not is_um3(model):
        yield model
        return
    folder = find(model)
    with tempfile.TemporaryDirectory() as out:
        save_text(load(folder), out, open_tokenizer(folder))
        yield out
