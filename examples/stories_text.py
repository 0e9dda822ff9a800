r"""Stories from the small Llama of `stories15m.py`, as text to train on.

    python examples/stories15m.py --out stories15M
    python examples/stories_text.py stories15M --num 20000 --out stories

TinyStories, the set that it was trained on, lies in no package registry; what it says when it is left to itself
(temperature 1) is text of the same kind. `train.jsonl` and `held-out.jsonl` have an object with `text` a line, the
same again for the same options. Each story that came to its end within the model's context counts; the rest is
left out.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer

from qlip.errors import InputError
from qlip.files import whole_file
from qlip.lm.checkpoint import load
from qlip.lm.generate import Sampling, generate


def stories(model: Path, rows: int, seed: int, device: str) -> Iterator[str]:
    """Endless stories, `rows` at a time; story i has the seed `seed` + i.

    Raises:
        InputError: the folder holds no Llama with a tokenizer.
    """
    if not (model / "tokenizer.json").exists():
        raise InputError(f"{str(model)!r} has no tokenizer.json: make it with examples/stories15m.py")
    lm, tokenizer = load(model, device=device), Tokenizer.from_file(str(model / "tokenizer.json"))
    bos, eos = lm.config.bos_token_id, lm.config.eos_token_id
    length, start = lm.config.max_position_embeddings - 1, seed
    ends = [token for token in (bos, eos) if isinstance(token, int)]  # it ends a story by beginning the next
    while True:
        seeds = range(start, start + rows)
        prompts = [torch.tensor([bos])] * rows
        for ids in generate(lm, prompts, length, Sampling(), seeds=seeds, stop_ids=ends).tolist():
            end = next((i for i, token in enumerate(ids) if token in ends), None)
            if end:
                yield tokenizer.decode(ids[:end]).strip()
        start += rows


def main(
    model: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path,
    num: int = 20_000,
    held_out: int = 500,
    rows: int = 256,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Write `train.jsonl` and `held-out.jsonl`.

    Args:
        model: Folder of the Llama.
        out: The new folder.
        num: How many stories to train on.
        held_out: How many besides; they are the first ones.
        rows: How many are written at once.
        seed: Of the first story; other seeds give others.
        device: cpu, or cuda.
    """
    source, began = stories(model, rows, seed, device), time.monotonic()
    for name, count in (("held-out", held_out), ("train", num)):
        with whole_file(out / f"{name}.jsonl") as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for _ in range(count):
                file.write(json.dumps({"text": next(source)}, ensure_ascii=False) + "\n")
    minutes = (time.monotonic() - began) / 60
    print(
        f"{num + held_out} stories in {minutes:.1f} min ({(num + held_out) / minutes:.0f} a minute) are in {out}"
    )


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"stories_text: {error}")
