"""Where a picture's tokens lie in a vocabulary that has words, too, and which id may come next."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageIds:
    """The ids of a model of text and images: words in [0, num_text), then the sub-tokens of pictures.

    The sub-token `value` of slot `slot` has the id num_text + slot · 2^bits + value: each slot of a token has rows
    of its own, since a stock language model has no other way to tell them apart.

    Attributes:
        num_text: ids of text, BOI and EOI included.
        num_bits: L, the width of a token.
        bits: the width of a sub-token; divides L.
        grid: rows and columns of tokens in a picture.
        boi, eoi: the text ids before and after a picture.
    """

    num_text: int
    num_bits: int
    bits: int
    grid: tuple[int, int]
    boi: int
    eoi: int

    @property
    def num_slots(self) -> int:
        """Sub-tokens of a token."""
        return self.num_bits // self.bits

    @property
    def num_visual(self) -> int:
        """Ids of pictures."""
        return self.num_slots * 2**self.bits

    @property
    def num_image_tokens(self) -> int:
        """Sub-tokens of a picture."""
        return self.grid[0] * self.grid[1] * self.num_slots

    def allowed(self, ids: Tensor, images: bool = False) -> Tensor:
        """Which id may come next: after BOI exactly a picture's sub-tokens, each of its slot, then EOI; else text.

        Args:
            ids: (B, T) those so far, from the beginning or padded on the left; T at least 1.
            images: whether BOI may come among the text, so that the model begins a picture of its own accord.

        Returns:
            (B, num_text + num_visual) booleans.
        """
        length, count = ids.shape[1], self.num_image_tokens
        places = torch.arange(length, device=ids.device)
        begun = torch.where(ids == self.boi, places, -1).amax(1, keepdim=True)
        since = torch.where(begun < 0, count + 1, length - 1 - begun)  # sub-tokens after the last BOI
        every = torch.arange(self.num_text + self.num_visual, device=ids.device)
        first = self.num_text + (since % self.num_slots) * 2**self.bits
        visual = (first <= every) & (every < first + 2**self.bits)
        text = (every < self.num_text) & (every != self.eoi)
        if not images:
            text &= every != self.boi
        return torch.where(since < count, visual, torch.where(since == count, every == self.eoi, text))
