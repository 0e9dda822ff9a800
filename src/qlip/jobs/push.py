"""A checkpoint folder to the Hugging Face hub, with what its card tells of."""

from pathlib import Path

from qlip.errors import InputError
from qlip.model.checkpoint import BUNDLED, bundled, load
from qlip.model.hub import COMPANIONS, CONFIG, WEIGHTS, upload

CARD = "README.md"
PAPERS = ("results.json", "recipe.json", "recipe-stage2.json", "ATTRIBUTION.md")
"""What `qlip publish` puts beside the card; a folder may lack them."""


def push(model: str, repo: str, private: bool = False, revision: str | None = None, message: str = "") -> str:
    """Upload a tokenizer that loads and has a card; other files in its folder stay at home.

    Args:
        model: a bundled name, or a folder.
        repo: "owner/name", made if need be.
        private: let only its owner see it.
        revision: branch, made if need be; the main one by default.
        message: of the commit.

    Returns:
        the page of the repository.

    Raises:
        InputError: the folder is no such tokenizer, or the hub does not take it.
    """
    folder = BUNDLED / model if model in bundled() else Path(model)
    if not folder.is_dir():
        raise InputError(f"{model!r} is not here: push a folder, or a bundled tokenizer ({', '.join(bundled())})")
    load(folder)
    if not (folder / CARD).is_file():
        raise InputError(f"{str(folder)!r} has no model card ({CARD}): `qlip publish` and `qlip export` write one")
    files = (CONFIG, WEIGHTS, *COMPANIONS, CARD, *PAPERS)
    return upload(folder, files, repo, private, revision, message or f"Upload {folder.resolve().name}")
