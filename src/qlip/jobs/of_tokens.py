"""The tokenizer that made the tokens of a training."""

from pathlib import Path

import torch

from qlip.data.token_file import TokenFormat
from qlip.errors import InputError
from qlip.model.checkpoint import is_name, load
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
    tokenizer = load(name, device=device)
    if tokenizer.id_hash() != found.id_hash:
        raise InputError(
            f"the tokens are ids {found.id_hash} of {found.model!r}, but {name!r} makes {tokenizer.id_hash()}: "
            "name their tokenizer with --tokenizer"
        )
    return tokenizer


def tokenizer_name(found: TokenFormat, named: str | None) -> str:
    """What a model that is trained on the tokens should call it, a folder by its whole path; see `load_tokenizer`.

    Raises:
        InputError: it was named, and there is none or it makes other ids; or the name in the files leads nowhere.
    """
    if named is None:
        if not is_name(found.model):
            raise InputError(
                f"the tokens are of a tokenizer called {found.model!r}, which is no bundled one, no folder and no "
                "hub id: say with --tokenizer where it is, for the model to find it"
            )
        return found.model
    load_tokenizer(found, named)
    return str(Path(named).resolve()) if Path(named).is_dir() else named
