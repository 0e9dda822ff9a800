"""Commands of the model of text and images: describe, draw, go on with a text."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.table import Table

from qlip.cli.options import (
    AT_LEAST_ONE,
    Device,
    Group,
    Json,
    Paths,
    Strict,
    cell,
    count_pictures,
    finish,
    print_json,
    print_table,
    say,
    track,
)
from qlip.errors import InputError

if TYPE_CHECKING:
    from qlip.um3.pipeline import UnifiedModel

DEFAULT_MODEL = "um3-tiny"

Model = Annotated[
    str, tyro.conf.arg(help="A bundled name, or a folder, such as RUN/model of `qlip train um3-tiny`.")
]
Tokenizer = Annotated[
    str | None, tyro.conf.arg(help="Of the pictures; default: the one that the model was trained with.")
]
Dtype = Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(help="Of the model's weights.")]


def caption(
    paths: Paths,
    /,
    *,
    model: Model = DEFAULT_MODEL,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    max_tokens: int = 64,
    batch_size: int = 16,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Say what pictures show.

    Args:
        paths: Pictures, and folders of them.
        temperature: 0 takes the likeliest words; above, they are drawn.
        top_p: Only the likeliest ids that together have this share.
        seed: Of drawn words.
        max_tokens: The longest caption, in ids.
        batch_size: Pictures at once.
    """
    from qlip.jobs.um3 import caption_files

    speaker = _load(model, tokenizer, device, dtype)
    options = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
    captions, failures = caption_files(speaker, paths, track("looking"), batch_size, **options)
    if json:
        print_json({"pictures": [{"path": p, "caption": text} for p, text in captions], "failed": failures})
    elif captions:
        table = Table("picture", "caption", box=None, padding=(0, 2, 0, 0))
        for path, text in captions:
            table.add_row(cell(path), cell(text))
        print_table(table)
    return finish(len(captions), failures, strict)


def draw(
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT…")] = (),
    /,
    *,
    out: Path,
    model: Model = DEFAULT_MODEL,
    prompt_file: Path | None = None,
    num: int = 1,
    cfg: float = 1.0,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.95,
    batch_size: int = 16,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Draw pictures after captions.

    Args:
        prompts: What should be in the pictures.
        out: Folder for the PNGs and grid.png.
        prompt_file: A file with further prompts, one a line.
        num: Pictures of each prompt.
        cfg: How strongly the prompt counts, from 1.
        seed: Of the first picture of each prompt; the next has one more.
        temperature: Below 1 more of the likely, above 1 more of the rest.
        top_k: Only so many of the likeliest sub-tokens; 0: all.
        top_p: Only the likeliest sub-tokens that together have this share.
        batch_size: Pictures at once.
    """
    from qlip.jobs.generate import generate_files, read_prompts

    every = [*prompts, *(read_prompts(prompt_file) if prompt_file else ())]
    if not every:
        raise InputError("there is no prompt: say what should be in the picture, or name a --prompt-file")
    drawn = generate_files(
        _load(model, tokenizer, device, dtype).draw,
        every,
        out,
        num,
        seed,
        track("drawing"),
        cfg=cfg,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
    )
    if json:
        print_json([asdict(picture) for picture in drawn])
    say(f"{count_pictures(len(drawn))} in {out}, all of them in {out / 'grid.png'}")
    return 0


def complete(
    texts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT…", help_behavior_hint=AT_LEAST_ONE)
    ],
    /,
    *,
    model: Model = DEFAULT_MODEL,
    num: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.95,
    max_tokens: int = 128,
    batch_size: int = 16,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Go on with texts.

    Args:
        texts: How they begin.
        num: Continuations of each.
        seed: Of the first one of each; the next has one more.
        temperature: 0 takes the likeliest words; below 1 more of the likely, above 1 more of the rest.
        top_k: Only so many of the likeliest ids; 0: all.
        top_p: Only the likeliest ids that together have this share.
        max_tokens: The most that is added, in ids.
        batch_size: Texts at once.
    """
    written = _load(model, None, device, dtype).complete(
        texts,
        num,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    if json:
        print_json(
            [{"beginning": texts[i // num], "seed": seed + i % num, "text": t} for i, t in enumerate(written)]
        )
    else:
        print("\n\n".join(written))
    return 0


um3 = Group(
    "Describe pictures, draw them after captions, or go on with texts, by one model.",
    {
        "caption": caption,
        "draw": draw,
        "complete": complete,
    },
)


def _load(model: str, tokenizer: str | None, device: str, dtype: str) -> "UnifiedModel":
    import torch

    from qlip.um3.pipeline import load_um3

    return load_um3(model, tokenizer=tokenizer, device=device, dtype=getattr(torch, dtype))
