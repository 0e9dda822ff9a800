"""A small UM3 made of a small Llama: words 0 to 98, BOI 99, EOI 100, then two slots of 16 visual ids."""

from pathlib import Path

import pytest
import torch
from tests.unit.lm.conftest import small_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import qlip
from qlip.um3.checkpoint import add_image_specials, save
from qlip.um3.config import UM3Config
from qlip.um3.model import UM3

TOKENS = {"num_bits": 8, "bits": 4, "grid": (2, 3), "tokenizer": "qlip-tiny", "id_hash": "0" * 16}
SPECIAL = {"boi": 99, "eoi": 100}


def base(seed: int = 0, **changes):
    return small_lm(seed, **{"bos_token_id": 1, "eos_token_id": 2} | changes)


def small_um3(noise: float = 1.0, language: dict | None = None, **changes) -> UM3:
    """Noise as wide as the rows are, so that visual ids matter to each other."""
    llama = base(**language or {})
    config = UM3Config.of(llama.config, **TOKENS | SPECIAL | changes)
    return UM3.from_llama(llama, config, noise=noise)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**8, (count, 6), generator=torch.Generator().manual_seed(seed))


def small_words() -> Tokenizer:
    """Bytes and a few merges; BOS is 1, EOS 2."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["a red mug on a table", "once upon a time there was a red dog"], trainer)
    return words


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("um3"))


def written(folder: Path) -> Path:
    """A random model of qlip-tiny's tokens in pieces of 14 bits, with words, in a folder."""
    words, tokenizer = small_words(), qlip.load("qlip-tiny")
    llama = base(vocab_size=words.get_vocab_size(), max_position_embeddings=192)
    boi, eoi = add_image_specials(words)
    shape = {"num_bits": 28, "bits": 14, "grid": (8, 8), "tokenizer": "qlip-tiny", "id_hash": tokenizer.id_hash()}
    config = UM3Config.of(llama.config, **shape, boi=boi, eoi=eoi)
    save(UM3.from_llama(llama, config, noise=1.0), folder, words)
    return folder
