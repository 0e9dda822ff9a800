"""Commands of text to image: draw pictures, compute features of captions; and features of images."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qlip.cli.options import AT_LEAST_ONE, Device, Json, count_pictures, finish, print_json, say, track
from qlip.errors import InputError


def generate(
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT…")] = (),
    /,
    *,
    out: Path,
    model: str = "t2i-tiny",
    prompt_file: Path | None = None,
    layout: Literal["geneval", "dpg"] | None = None,
    num: int | None = None,
    cfg: float = 7.5,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 1000,
    top_p: float = 1.0,
    batch_size: int = 16,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Draw pictures after words, with a text-to-image model.

    Args:
        prompts: What should be in the pictures; of a model of labels their numbers.
        out: Folder for the PNGs and grid.png.
        model: A bundled name, or a folder, such as RUN/model of `qlip train t2i-tiny`.
        prompt_file: A file with further prompts, one a line; of a benchmark its own.
        layout: Write what the scorer of GenEval or DPG-Bench reads; what is there is not drawn again.
        num: Pictures of each prompt; default 1, of a benchmark 4.
        cfg: How strongly the prompt counts, from 1.
        seed: Of the first picture of each prompt; the next has one more.
        temperature: Below 1 more of the likely, above 1 more of the rest.
        top_k: Only so many of the likeliest sub-tokens; 0: all.
        top_p: Only the likeliest sub-tokens that together have this share.
        batch_size: Pictures at once.
        tokenizer: That draws the tokens; default: the one that the model was trained with.
        dtype: Of the model's weights.
    """
    import torch

    from qlip.jobs.generate import generate_files, read_prompts
    from qlip.jobs.layouts import DEFAULT_NUM, draw_layout
    from qlip.t2i.pipeline import load_t2i

    if layout and (prompts or not prompt_file):
        raise InputError(f"--layout {layout} is of the benchmark's own prompts: name them with --prompt-file")
    every = [*prompts, *(read_prompts(prompt_file) if prompt_file and not layout else ())]
    if not every and not layout:
        raise InputError("there is no prompt: say what should be in the picture, or name a --prompt-file")
    painter = load_t2i(model, tokenizer=tokenizer, device=device, dtype=getattr(torch, dtype))
    settings: dict[str, Any] = {"cfg": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings["batch_size"] = batch_size
    if num is None:
        num = DEFAULT_NUM if layout else 1
    rest = (out, num, seed, track("drawing"))
    if layout and prompt_file:
        files: Sequence[Any] = draw_layout(painter, layout, prompt_file, *rest, **settings)
        said = f"{len(files):,} files in {out}, as the scorer of {layout} reads them"
    else:
        files = generate_files(painter.generate, every, *rest, **settings)
        said = f"{count_pictures(len(files))} in {out}, all of them in {out / 'grid.png'}"
    if json:
        print_json([asdict(file) for file in files])
    say(said)
    return 0


def features(
    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH…", help_behavior_hint=AT_LEAST_ONE)
    ],
    /,
    *,
    out: Path,
    vision: str | None = None,
    grid: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="ROWS COLUMNS")] = None,
    batch_size: int = 32,
    num_workers: int = 0,
    compile: bool = False,
    condition: str = "google/flan-t5-xl",
    num_text_tokens: int = 120,
    tokenizer: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float16",
    classes: Path | None = None,
    device: Device = "auto",
) -> int:
    """Compute features once: of captions for `qlip train t2i-… --features`, or of images for `--teacher`.

    Args:
        sources: Token files with captions, and folders of them; with --vision sources of images, see docs/data.md.
        out: The new file, .safetensors. Features of captions must fit into memory, so give a file for each of many
            token files. With --vision a file that is there is completed.
        vision: Compute features of images with this vision model of `transformers`: a folder or hub id.
        grid: Of the vision model keep the grid of features, too, average-pooled to these rows and columns.
        batch_size: Images at once.
        num_workers: Processes that decode images; 0: this one.
        compile: Compile the vision model, which takes a minute.
        condition: qlip for the tokenizer's text tower, or an encoder of `transformers`.
        num_text_tokens: The most of a caption that is read.
        tokenizer: Whose text tower; default: the one that the token files name.
        dtype: Of the features of captions in the file; those of images are float16.
        classes: JSON file of class names, if images of token files have labels and no captions.
    """
    import torch

    if vision is not None:
        if tokenizer or classes:
            raise InputError("--tokenizer and --classes are of captions: leave them out with --vision")
        from qlip.jobs.vision_features import compute_vision_features

        settings = (grid, batch_size, num_workers, compile, device, track("looking"))
        num_done, faults = compute_vision_features(sources, out, vision, *settings)
        say(f"features of {num_done:,} images in {out}")
        return finish(num_done, [f"{fault.key}: {fault.reason}" for fault in faults], strict=False)
    if grid or compile:
        raise InputError("--grid and --compile are of images: name a vision model with --vision")
    from qlip.jobs.features import compute_features

    count = compute_features(
        [Path(source) for source in sources],
        out,
        condition,
        num_text_tokens,
        tokenizer,
        getattr(torch, dtype),
        device,
        classes,
        track("reading"),
    )
    say(f"features of {count:,} texts in {out}")
    return 0
