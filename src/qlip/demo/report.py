"""The demo: a tokenizer on twelve photographs, beside JPEG, WebP and AVIF, as one page of HTML.

photo ─ preprocess ─┬─ tokenize ─ detokenize ─── PSNR, SSIM ─┐
                    ├─ JPEG, WebP, AVIF near that size ──────┼─ Summary ─ index.html, table
                    └─ classify, the photos' labels as words ┘
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import mean

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from qlip.bits import unpack
from qlip.demo.drawn import draw_prompts, use_unified
from qlip.demo.page import render
from qlip.demo.summary import Example, Photo, Rendition, Row, Summary
from qlip.demo.tokenmap import draw, token_colors
from qlip.eval.batches import Track
from qlip.eval.codecs import CODECS, read, write_lossless
from qlip.eval.metrics import psnr, ssim, stack_uint8, to_uint8
from qlip.files import whole_file
from qlip.machine import num_cores
from qlip.model.checkpoint import BUNDLED, bundled
from qlip.model.qlip import QLIP

PHOTOS = files("qlip.demo") / "photos"
TEMPLATES = ("a photo of {}.",)  # the labels bring their own article
OURS = "QLIP"


def build(model: QLIP, out: Path, track: Track = iter) -> Summary:
    """Run the demo and write its page.

    The same model gives the same page, byte for byte, on one machine. The time goes into AVIF files, some ten
    seconds for 64-pixel pictures and some two minutes for 256-pixel ones, and into what the bundled models of a
    bundled tokenizer's tokens draw and say.

    Args:
        model: a tokenizer with an image processor; without a text vocabulary the words are left out.
        out: folder for `index.html`, made if need be. The page needs no other file.
        track: shows progress over the photographs.

    Returns:
        The numbers, and where the page is.

    Raises:
        InputError: the model takes no pictures, this Pillow lacks a format, or `out` cannot be written.
    """
    examples = tuple(_examples(model, track))
    decoder = (model.vision_model.quant_embed_post, model.vision_decoder)
    summary = Summary(
        name=model.name,
        id_hash=model.id_hash(),
        config=model.config,
        decoder_size=sum(p.numel() for module in decoder for p in module.parameters()),
        rows=tuple(_rows(examples)),
        examples=examples,
        held_out=_held_out(model),
        path=out / "index.html",
        drawings=draw_prompts(model),
        unified=use_unified(model, [file for _, file in read_photos()]),
    )
    with whole_file(summary.path) as unfinished:
        unfinished.write_text(render(summary), encoding="utf-8")
    return summary


def print_summary(summary: Summary, console: Console) -> None:
    """Show the numbers in a terminal, and where the page is."""
    count = len(summary.examples)
    table = Table(title=f"{summary.name}: {count} photographs, means", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in ("bytes", "bits/pixel", "PSNR dB", "SSIM", "header", "PSNR dB, header free"):
        table.add_column(heading, justify="right")
    for i, row in enumerate(summary.rows):
        table.add_row(
            row.method,
            f"{row.num_bytes:,.0f}",
            f"{row.bits_per_pixel:.2f}",
            f"{row.psnr:.2f}",
            f"{row.ssim:.3f}",
            f"{row.header}",
            f"{row.header_free_psnr:.2f}",
            style=None if i else "bold",
        )
    console.print(table)
    if summary.num_right is None:
        console.print("Words: none, the model has no text vocabulary.")
    else:
        console.print(f"Words: {summary.num_right} of {count} photographs named right, among {count} labels.")
    if summary.held_out:
        console.print(summary.held_out, highlight=False)
    console.print(f"Report: {summary.path}", highlight=False, soft_wrap=True)


def read_photos() -> list[tuple[Photo, bytes]]:
    """The photographs that the package ships, as encoded files."""
    entries = json.loads((PHOTOS / "photos.json").read_text(encoding="utf-8"))
    return [(photo := Photo(**entry), (PHOTOS / photo.file).read_bytes()) for entry in entries]


def _held_out(model: QLIP) -> str:
    """The numbers of a bundled tokenizer's card, in a sentence."""
    file = BUNDLED / model.name / "results.json"
    if model.name not in bundled() or not file.exists():
        return ""
    measured = json.loads(file.read_text(encoding="utf-8"))
    if measured["ids"] != model.id_hash():  # a folder of the same name
        return ""
    found, num_names = measured["results"], measured["num_classes"]
    return (
        f"On {measured['num_samples']:,} photographs that training never saw: PSNR {found['psnr']:.2f} dB, "
        f"SSIM {found['ssim']:.3f}; words name {found['top1']:.1%} of them right among {num_names} classes, "
        f"{found['top5']:.1%} within five guesses."
    )


def _examples(model: QLIP, track: Track) -> Iterator[Example]:
    photos, encoded = zip(*read_photos(), strict=True)
    tokens = model.tokenize(encoded)
    rebuilt = to_uint8(model.detokenize(tokens)).permute(0, 2, 3, 1).numpy()
    bits = unpack(tokens, model.config.num_bits)
    colors = token_colors(bits)
    labels = [photo.label for photo in photos]
    chances = model.classify(encoded, labels, TEMPLATES) if model.text_tokenizer is not None else None
    num_bytes = -(-model.config.num_tokens * model.config.num_bits // 8)
    originals = [model.need_image_processor().preprocess(file) for file in encoded]
    with ThreadPoolExecutor(num_cores()) as pool:
        all_files = list(track(pool.map(partial(_files, num_bytes=num_bytes), originals)))
    for i, (photo, original, (near, free)) in enumerate(zip(photos, originals, all_files, strict=True)):
        ours = _rendition(OURS, original, write_lossless(Image.fromarray(rebuilt[i])), num_bytes)
        ranked = [] if chances is None else sorted(zip(chances[i].tolist(), labels, strict=True), reverse=True)
        yield Example(
            photo,
            original=write_lossless(original),
            tokens=tokens[i],
            colors=colors[i],
            token_map=write_lossless(draw(bits[i], colors[i], model.config.grid)),
            renditions=(ours, *(_rendition(name, original, file) for name, file in near.items())),
            header_free=(ours, *(_rendition(name, original, file) for name, file in free.items())),
            guesses=tuple((label, chance) for chance, label in ranked),
        )


def _files(picture: Image.Image, num_bytes: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """By format, the files nearest to `num_bytes`, and to that and the format's header."""
    near, free = {}, {}
    for codec in CODECS:
        header = codec.header_size(picture.size)
        near[codec.name], free[codec.name] = codec.nearest(codec.encoder(picture), num_bytes, num_bytes + header)
    return near, free


def _rendition(method: str, original: Image.Image, file: bytes, num_bytes: int | None = None) -> Rendition:
    a, b = stack_uint8([original]), stack_uint8([read(file)])
    size = len(file) if num_bytes is None else num_bytes
    return Rendition(method, size, file, psnr=psnr(a, b).item(), ssim=ssim(a, b).item())


def _rows(examples: Sequence[Example]) -> Iterator[Row]:
    size = read(examples[0].original).size
    headers = [0, *(codec.header_size(size) for codec in CODECS)]
    for i, header in enumerate(headers):
        all_of = [e.renditions[i] for e in examples]
        num_bytes = mean(r.num_bytes for r in all_of)
        yield Row(
            all_of[0].method,
            num_bytes=num_bytes,
            smallest=min(r.num_bytes for r in all_of),
            bits_per_pixel=8 * num_bytes / (size[0] * size[1]),
            psnr=mean(r.psnr for r in all_of),
            ssim=mean(r.ssim for r in all_of),
            header=header,
            header_free_psnr=mean(e.header_free[i].psnr for e in examples),
        )
