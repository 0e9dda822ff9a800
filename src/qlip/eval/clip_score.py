"""How well pictures fit their words, by a CLIP of `transformers` or by a QLIP's own towers.

CLIPScore (Hessel et al. 2021, arXiv 2104.08718) is w · max(cos, 0) of the two embeddings. Here w = 1, the scale of
the paper's Table 7, whose .316 is a cosine; the article has w = 2.5 and the words "A photo depicts" before each
caption, torchmetrics w = 100. No words are put before captions here. Which CLIP it is makes the number.

Of `qlip.eval` this file alone imports `transformers`, where a CLIP is asked for.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from qlip.errors import InputError, MissingExtra, one_line
from qlip.model.qlip import QLIP
from qlip.model.text import check_text, context_length


class Matcher(Protocol):
    """Says how well pictures fit words.

    Attributes:
        name: of the model.
        metric: "clip_score", or "qlip_score", which is no CLIPScore.
    """

    name: str
    metric: str

    def __call__(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) uint8 and B texts → (B,) float32, cosines in [−1, 1]; long texts are cut."""


class ClipMatcher:
    """By a CLIP of `transformers`, with its own processor."""

    metric = "clip_score"

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        """Load model and processor.

        Args:
            name: folder or hub id.
            device: where.

        Raises:
            InputError: `transformers` is missing, or there is no such CLIP.
        """
        try:
            from transformers import AutoModel, AutoProcessor
        except ImportError as error:
            raise MissingExtra("CLIPScore needs `transformers`: pip install 'open-qlip[transformers]'") from error
        try:
            self.processor: Any = AutoProcessor.from_pretrained(name)
            self.model: Any = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{name!r} is no CLIP of transformers ({one_line(error)})") from error
        if not hasattr(self.model, "get_image_features"):
            raise InputError(
                f"{name!r} is a {type(self.model).__name__}, which does not embed pictures and words: name a CLIP"
            )
        self.name = name
        config = getattr(self.model.config, "text_config", self.model.config)
        self.processor.tokenizer.model_max_length = context_length(self.processor.tokenizer, self.model, config)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """See `Matcher`."""
        images = [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in pictures]
        texts = [check_text(text) for text in texts]
        inputs = self.processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt").to(
            self.model.device
        )
        found = self.model(**inputs)
        return torch.cosine_similarity(found.image_embeds, found.text_embeds).float()


class QlipMatcher:
    """By a QLIP's own towers."""

    metric = "qlip_score"

    def __init__(self, model: QLIP):
        """Hold the model.

        Raises:
            InputError: it has no image processor or no text vocabulary.
        """
        self.processor, self.vocabulary = model.need_image_processor(), model.need_text_tokenizer()
        self.model, self.name = model, model.name

    @torch.no_grad()
    def __call__(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """See `Matcher`."""
        images = [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in pictures]
        input_ids, _ = self.vocabulary(list(texts))
        image_embeds = self.model.encode_image(self.processor(images).to(self.model.device))
        text_embeds = self.model.encode_text(input_ids.to(self.model.device))
        return torch.cosine_similarity(image_embeds, text_embeds).float()
