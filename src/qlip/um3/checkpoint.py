"""A UM3 as a folder: a stock language model's, the words' `tokenizer.json`, and `um3.json` of what is ours.

`config.json` and the weights are those of a `Qwen3ForCausalLM` (without QK-norm a `LlamaForCausalLM`), whose
vocabulary goes on with the ids of pictures: any tool that runs one runs the model.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from qlip.errors import InputError, one_line
from qlip.guarded import read_object, typed
from qlip.lm import checkpoint as lm
from qlip.lm.transformer import Transformer
from qlip.model.checkpoint import BUNDLED
from qlip.um3.config import UM3Config
from qlip.um3.model import UM3, skeleton, text_view

CONFIG, WORDS, WORDS_CONFIG = "um3.json", "tokenizer.json", "tokenizer_config.json"
BOI_TOKEN, EOI_TOKEN = "<|boi|>", "<|eoi|>"


def save(
    model: UM3, folder: str | os.PathLike[str], tokenizer: Tokenizer, *, dtype: torch.dtype | None = None
) -> None:
    """Write a folder that `load` reads again.

    Everything is written beside and renamed when it is complete, so that a failure leaves what was there.

    Args:
        model: on any device.
        folder: made if need be; the files of a model that is there are replaced.
        tokenizer: of its words, with BOI and EOI.
        dtype: of the weights in the file; the model's by default.

    Raises:
        InputError: the tokenizer is of other ids, or the folder cannot be written.
    """
    check_words(model.config, tokenizer)
    values = {name: value for name, value in asdict(model.config).items() if name != "lm"}
    lm.save(model.lm, folder, dtype=dtype, companions={CONFIG: _json(values)} | _words(model.config, tokenizer))


def save_text(
    model: UM3, folder: str | os.PathLike[str], tokenizer: Tokenizer, *, dtype: torch.dtype | None = None
) -> Transformer:
    """Write the model as a language model alone, without the rows of pictures; see `save`.

    Returns:
        what was written.
    """
    check_words(model.config, tokenizer)
    view = text_view(model)
    lm.save(view, folder, dtype=dtype, companions=_words(model.config, tokenizer))
    (Path(folder) / CONFIG).unlink(missing_ok=True)  # of a whole model that was there
    return view


def load(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> UM3:
    """Read a folder that `save` wrote.

    Args:
        folder: of the model.
        device: where it goes; "auto" takes a GPU if there is one.
        dtype: of the weights.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: there is no such model, or it is not whole.
    """
    config = read_config(Path(folder))
    weights = lm.load(folder, device=device, dtype=dtype)
    model = skeleton(config)
    model.lm = weights
    return model.eval()


def read_config(folder: Path) -> UM3Config:
    """The configuration of a folder.

    Raises:
        InputError: it has none, or its two files do not fit each other.
    """
    path = folder / CONFIG
    try:
        return typed(UM3Config, read_object(path) | {"lm": asdict(lm.read_config(folder))})
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(folder)!r} is not a model of text and images ({path.name}: {one_line(error)})"
        ) from error


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: one that comes with this package, by its name, else a folder.

    Raises:
        InputError: there is none.
    """
    if name in (known := bundled()):
        return BUNDLED / str(name)
    if not is_um3(name):
        raise InputError(
            f"{os.fspath(name)!r} is not a model of text and images: use a bundled one "
            f"({', '.join(known) or 'there is none'}), or a folder with {CONFIG}, such as RUN/model"
        )
    return Path(name)


def bundled() -> list[str]:
    """Names of the models that come with this package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def is_um3(name: str | os.PathLike[str]) -> bool:
    """Whether `find` finds such a model."""
    return name in bundled() or (Path(name) / CONFIG).is_file()


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the weights in a folder's file.

    Raises:
        InputError: its configuration does not say.
    """
    name = _read_json(folder / lm.CONFIG).get("dtype")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{str(folder / lm.CONFIG)!r}: dtype is {name!r}, name one such as float32 or bfloat16")
    return dtype


def open_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The words of a language model's folder; `<|boi|>` and the like in a text are to it text as any other.

    Raises:
        InputError: there are none.
    """
    path = Path(folder) / WORDS
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"{str(path)!r} is not a usable vocabulary file ({one_line(error)}): it belongs beside the model"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # or a prompt could begin a picture
    return tokenizer


def add_image_specials(tokenizer: Tokenizer) -> tuple[int, int]:
    """Add BOI and EOI to a tokenizer that has not got them.

    Returns:
        their ids.
    """
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (BOI_TOKEN, EOI_TOKEN)])
    ids = tokenizer.get_vocab()
    return ids[BOI_TOKEN], ids[EOI_TOKEN]


def check_words(config: UM3Config, tokenizer: Tokenizer) -> None:
    """Whether a tokenizer is the model's.

    Raises:
        InputError: it is not.
    """
    found = [tokenizer.token_to_id(token) for token in (BOI_TOKEN, EOI_TOKEN)]
    if found != [config.boi, config.eoi]:
        raise InputError(
            f"{BOI_TOKEN} and {EOI_TOKEN} are ids {found} of the tokenizer, but {[config.boi, config.eoi]} of the "
            f"model: use the {WORDS} that it was trained with"
        )
    if (size := tokenizer.get_vocab_size()) > config.num_text:
        raise InputError(f"the tokenizer has {size} ids, but the model {config.num_text} of text: use its own")


def _words(config: UM3Config, tokenizer: Tokenizer) -> dict[str, str]:
    """The files of the words; transformers' AutoTokenizer reads both."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(config.bos),
        "eos_token": tokenizer.id_to_token(config.eos),
        "model_max_length": config.lm.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    return {WORDS: tokenizer.to_str(), WORDS_CONFIG: _json(settings)}


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a usable model configuration: {one_line(error)}") from error
