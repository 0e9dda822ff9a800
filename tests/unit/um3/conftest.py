"""A small UM3 made of a small Llama: words 0 to 98, BOI 99, EOI 100, then two slots of 16 visual ids."""

import torch
from tests.unit.lm.conftest import small_lm

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
