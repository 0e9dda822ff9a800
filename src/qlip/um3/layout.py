"""How texts and pictures become sequences of ids, and back.

    text           BOS text EOS
    image to text  BOS BOI picture EOI caption EOS
    text to image  BOS caption BOI picture EOI EOS

A picture is the sub-tokens of its tokens, row by row, a token's most significant first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlip.bits import sub_tokens_to_tokens, tokens_to_sub_tokens
from qlip.errors import InputError
from qlip.um3.config import UM3Config


def visual_ids(tokens: Tensor, config: UM3Config) -> Tensor:
    """A picture's tokens to its ids.

    Args:
        tokens: (..., N) integers in [0, 2^L).
        config: the model's.

    Returns:
        (..., N · num_slots) int64 in [num_text, num_text + num_visual).

    Raises:
        InputError: a token is out of range.
    """
    sub_tokens = tokens_to_sub_tokens(tokens, config.num_bits, config.bits)
    return (sub_tokens + _first_ids(config, tokens.device)).flatten(-2)


def image_tokens(ids: Tensor, config: UM3Config) -> Tensor:
    """The inverse of `visual_ids`: (..., N · num_slots) → (..., N).

    Raises:
        InputError: there is no whole number of tokens, or an id is not of its slot.
    """
    if ids.shape[-1] % config.num_slots:
        raise InputError(f"{ids.shape[-1]} ids are no whole number of tokens: {config.num_slots} make one")
    sub_tokens = ids.unflatten(-1, (-1, config.num_slots)) - _first_ids(config, ids.device)
    wrong = (sub_tokens < 0) | (sub_tokens >= 2**config.bits)
    if wrong.any():
        place = int(wrong.flatten().nonzero()[0])
        raise InputError(
            f"id {int(ids.flatten()[place])} is not of slot {place % config.num_slots}: pass the ids between BOI "
            "and EOI, all of them, without these two"
        )
    return sub_tokens_to_tokens(sub_tokens, config.num_bits, config.bits)


def text_document(ids: Sequence[int], config: UM3Config) -> list[int]:
    """BOS text EOS."""
    return [config.bos, *ids, config.eos]


def image_to_text(tokens: Tensor, caption: Sequence[int], config: UM3Config) -> list[int]:
    """BOS BOI picture EOI caption EOS, of tokens (N,)."""
    return [config.bos, *picture(tokens, config), *caption, config.eos]


def text_to_image(caption: Sequence[int], tokens: Tensor, config: UM3Config) -> list[int]:
    """BOS caption BOI picture EOI EOS, of tokens (N,)."""
    return [config.bos, *caption, *picture(tokens, config), config.eos]


def picture(tokens: Tensor, config: UM3Config) -> list[int]:
    """BOI picture EOI, of tokens (N,).

    Raises:
        InputError: they are not those of a picture.
    """
    count = config.grid[0] * config.grid[1]
    if tokens.shape != (count,):
        raise InputError(
            f"a picture's tokens are {tuple(tokens.shape)}, this model's are ({count},): its grid is {config.grid}"
        )
    return [config.boi, *visual_ids(tokens, config).tolist(), config.eoi]


def positions(document_ids: Tensor) -> Tensor:
    """Where in its document each token stands.

    Args:
        document_ids: (B, T) integers, the same within a document, others in the next.

    Returns:
        (B, T) int64, from 0 in each.
    """
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values


def _first_ids(config: UM3Config, device: torch.device) -> Tensor:
    """(num_slots,) the id of each slot's value 0."""
    return config.num_text + torch.arange(config.num_slots, device=device) * 2**config.bits
