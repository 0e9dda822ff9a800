"""The tokenizer that made the tokens of a training."""

from pathlib import Path

import torch

from qlip.data.token_file import TokenFormat
from qlip.errors import InputError
from qlip.model.checkpoint import bundled, is_hub_id, load
from qlip.model.qlip import QLIP


def load_tokenizer(found: TokenFormat, named: str | None, device: str | torch.device = "cpu") -> QLIP:
    """Load it.

    Args:
        found: what the token files say.
        named: a bundled name, a folder or a hub id; None takes the name that the files have.
        device: where it goes.

    Raises:
        InputError: there is no such tokenizer, or it makes other ids.
    """
    name = named or found.model
    try:
        tokenizer = load(name, device=device)
    except InputError as error:
        if named:
            raise
        raise InputError(
            f"the tokens are of a tokenizer called {name!r}, but {error}; say with --tokenizer where it is"
        ) from error
    if tokenizer.id_hash() != found.id_hash:
        raise InputError(
            f"the tokens are ids {found.id_hash} of {found.model!r}, but {name!r} makes {tokenizer.id_hash()}: "
            "name their tokenizer with --tokenizer"
        )
    return tokenizer


def tokenizer_name(found: TokenFormat, named: str | None) -> str:
    """What a model that is trained on the tokens should call it, a folder by its whole path; see `load_tokenizer`.

    Raises:
        InputError: there is none, or it makes other ids. A repository of the hub that the files name is believed.
    """
    name = named or found.model
    if named or not is_hub_id(name):
        load_tokenizer(found, named)
    return str(Path(name).resolve()) if name not in bundled() and Path(name).is_dir() else name
