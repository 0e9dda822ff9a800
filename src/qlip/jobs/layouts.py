"""Pictures for the scorers of GenEval and DPG-Bench, in the files that they read (docs/t2i.md).

GenEval (Ghosh et al. 2023): its `evaluation_metadata.jsonl` has an object with `prompt` a line; line N becomes
`0000N/metadata.jsonl`, its pictures `0000N/samples/0000.png` and so on. DPG-Bench (Hu et al. 2024): a folder of
prompts `NAME.txt`; each becomes `NAME.png`, four pictures in two rows.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from qlip.data.values import read_text
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.files import json_lines, whole_file
from qlip.jobs.draw import Sheet, draw_sheets, fingerprint
from qlip.t2i.condition import check_prompt
from qlip.t2i.pipeline import TextToImage

Layout = Literal["geneval", "dpg"]
DEFAULT_NUM = 4  # pictures of a prompt, in both


def draw_layout(
    model: TextToImage,
    layout: Layout,
    prompts: Path,
    out: Path,
    num: int = DEFAULT_NUM,
    seed: int = 0,
    track: Track = iter,
    batch_size: int = 16,
    **settings: Any,
) -> list[Sheet]:
    """Draw a benchmark's prompts; what is there is not drawn again. Long prompts are cut to what the model reads.

    Args:
        model: what draws.
        layout, prompts, out, num, seed: see `layout_sheets`.
        track: shows progress.
        batch_size: pictures at once.
        settings: see `TextToImage.draw_rows`.

    Returns:
        the files.

    Raises:
        InputError: see `layout_sheets` and `draw_sheets`.
    """
    sheets = layout_sheets(layout, prompts, out, num, seed)
    draw = partial(model.draw_rows, batch_size=batch_size, **settings)
    draw_sheets(sheets, draw, {"model": fingerprint(model), **settings}, track)
    return sheets


def layout_sheets(layout: Layout, prompts: Path, out: Path, num: int, seed: int) -> list[Sheet]:
    """The files that a benchmark wants drawn; GenEval's `metadata.jsonl` are written.

    Args:
        layout: whose.
        prompts: its file, or for DPG-Bench its folder.
        out: folder for the scorer.
        num: pictures of each prompt; DPG-Bench has 4.
        seed: of the first picture of each prompt; the next has one more.

    Raises:
        InputError: `prompts` is not what the benchmark has, or `num` is not.
    """
    if num < 1 or seed < 0:
        raise InputError(f"num is {num} and seed {seed}: use 1 and 0, or more")
    seeds = tuple(range(seed, seed + num))
    return _geneval(prompts, out, seeds) if layout == "geneval" else _dpg(prompts, out, seeds)


def _geneval(prompts: Path, out: Path, seeds: tuple[int, ...]) -> list[Sheet]:
    try:
        entries = list(json_lines(prompts))
        texts = [check_prompt(entry["prompt"]) for _, _, entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{prompts} is not GenEval's list of prompts ({error!r}): name its prompts/evaluation_metadata.jsonl"
        ) from error
    if not texts:
        raise InputError(f"{prompts} holds no prompts: name GenEval's prompts/evaluation_metadata.jsonl")
    sheets = []
    for number, ((_, line, _), text) in enumerate(zip(entries, texts, strict=True)):
        folder = out / f"{number:05d}"
        with whole_file(folder / "metadata.jsonl") as unfinished:
            unfinished.write_text(line + "\n", encoding="utf-8")
        sheets += [Sheet(folder / "samples" / f"{k:04d}.png", text, (seed,)) for k, seed in enumerate(seeds)]
    return sheets


def _dpg(prompts: Path, out: Path, seeds: tuple[int, ...]) -> list[Sheet]:
    if len(seeds) != DEFAULT_NUM:
        raise InputError(f"num is {len(seeds)}: DPG-Bench has {DEFAULT_NUM} pictures of each prompt")
    files = sorted(prompts.glob("[!.]*.txt"))
    if not files:
        raise InputError(f"{prompts} is no folder of DPG-Bench's prompts, NAME.txt: name its dpg_bench/prompts")
    try:
        texts = [" ".join(read_text(file).split()) for file in files]
    except (OSError, InputError) as error:
        raise InputError(f"a prompt in {prompts} cannot be read ({error})") from error
    return [Sheet(out / f"{file.stem}.png", text, seeds) for file, text in zip(files, texts, strict=True)]
