"""Let `generate` of transformers draw with a UM3: after BOI a whole picture of visual ids, else text.

processor = UM3LogitsProcessor("folder of the model")
ids = model.generate(**inputs, logits_processor=[processor])
"""

import json
import os
from dataclasses import fields
from pathlib import Path

from torch import Tensor
from transformers import LogitsProcessor

from qlip.errors import InputError, one_line
from qlip.lm.image_ids import ImageIds


class UM3LogitsProcessor(LogitsProcessor):
    """Closes the ids that may not come next; see `ImageIds.allowed`.

    Attributes:
        image_ids: where pictures lie among the ids.
        images: whether the model may begin pictures of its own accord.
    """

    def __init__(self, folder: str | os.PathLike[str], images: bool = False):
        """Read what the ids of a model are.

        Args:
            folder: of the model.
            images: see the class.

        Raises:
            InputError: it holds no such model.
        """
        path = Path(folder) / "um3.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            self.image_ids = ImageIds(**{field.name: values[field.name] for field in fields(ImageIds)})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{str(folder)!r} is no UM3 ({path.name}: {one_line(error)})") from error
        self.images = images

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids so far (B, T) and scores of the next (B, V) → those that are closed at -inf."""
        return scores.masked_fill(~self.image_ids.allowed(input_ids, self.images), float("-inf"))
