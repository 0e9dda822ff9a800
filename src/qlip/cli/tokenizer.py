"""Commands that use a tokenizer."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlip.cli.data import Sources, Workers
from qlip.cli.options import (
    DEFAULT_MODEL,
    Device,
    HowToResize,
    ImageSize,
    Json,
    Model,
    Paths,
    PositionalModel,
    Strict,
    and_more,
    cell,
    count_pictures,
    finish,
    load,
    print_json,
    print_table,
    rank,
    say,
    track,
)


def info(
    model: PositionalModel = DEFAULT_MODEL,
    /,
    *,
    revision: str | None = None,
    image_size: ImageSize = None,
    json: Json = False,
) -> int:
    """Say what a tokenizer is: sizes, tokens, bits, the name of its ids.

    Args:
        revision: branch, tag or commit on the hub.
    """
    from qlip.jobs.info import describe_model

    facts = describe_model(load(model, "cpu", revision, image_size))
    if json:
        print_json(facts)
    else:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in facts.items():
            text = f"{value:,}" if isinstance(value, int) else escape(value)
            table.add_row(f"[bold]{name.replace('_', ' ')}", text)
        print_table(table)
    return 0


def verify(
    model: PositionalModel = DEFAULT_MODEL,
    /,
    *,
    revision: str | None = None,
    json: Json = False,
) -> int:
    """Check that a checkpoint holds what it claims, from its keys to a rebuilt picture.

    Args:
        revision: branch, tag or commit on the hub.
    """
    from qlip.eval.verify import NOT_RUN
    from qlip.eval.verify import verify as run_checks

    checks = run_checks(model, revision=revision)
    if json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            mark = "[green]✓[/]" if check.passed else "[dim]–[/]" if check.detail == NOT_RUN else "[red]✗[/]"
            Console(soft_wrap=True).print(f"{mark} [bold]{check.name}[/]  {escape(check.detail)}", highlight=False)
    return 0 if all(check.passed for check in checks) else 1


def tokenize(
    sources: Sources,
    /,
    *,
    out: Path,
    model: Model = DEFAULT_MODEL,
    image_size: ImageSize = None,
    resize: HowToResize = "crop",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    keep: tuple[Literal["caption", "captions", "label"], ...] = (),
    shard_rows: int = 10_000,
    batch_size: int = 64,
    num_workers: Workers = None,
    device: Device = "auto",
    engine: Literal["local", "onnx", "ray"] = "local",
    strict: Strict = False,
) -> int:
    """Turn pictures into tokens and write them as Parquet; a job that was interrupted goes on where it was.

    Args:
        sources: Pictures, folders of them, and any other source of data; see docs/tokens.md.
        out: A file, tokens.parquet, or, without .parquet, a folder of shards with a manifest.
        dtype: Of the weights.
        keep: Columns beside key and tokens.
        shard_rows: Pictures that a shard is made from.
        batch_size: Pictures at once.
        engine: local: this machine, all GPUs under torchrun; onnx: ONNX Runtime, --model being a folder of
            `qlip export --format onnx`; ray: a Ray cluster.
    """
    from qlip.jobs.tokens import tokenize as run_tokenize
    from qlip.jobs.tokens_job import Job

    job = Job(
        model, sources, out, image_size, dtype, keep, shard_rows, batch_size, num_workers, device, engine, resize
    )
    done = run_tokenize(job, track("tokenizing"))
    if done.files:
        say(f"{count_pictures(done.num_rows)} in {and_more(done.files)}")
    code = finish(done.num_rows, done.failures if rank() == "0" else [], strict)
    if done.lost:
        say(f"{len(done.lost)} shards could not be read to their end: start it again to try them again")
    return 1 if done.lost or (strict and done.failures) else code


def detokenize(paths: Paths, /, *, out: Path, model: Model = DEFAULT_MODEL, device: Device = "auto") -> int:
    """Rebuild pictures from token files, in the size that they had when they were tokenized.

    Args:
        paths: Token files, and folders of them.
        out: Folder for the PNGs, named as the pictures were.
    """
    from qlip.jobs.tokens import detokenize_files

    written = detokenize_files(load(model, device), paths, out, track("rebuilding"))
    say(f"{count_pictures(len(written))} in {out}")
    return 0


def reconstruct(
    paths: Paths,
    /,
    *,
    out: Path,
    model: Model = DEFAULT_MODEL,
    image_size: ImageSize = None,
    resize: HowToResize = "crop",
    device: Device = "auto",
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Rebuild pictures from their tokens, side by side with the originals, and measure.

    Args:
        paths: Pictures, and folders of them.
        out: Folder for the side-by-side PNGs: original left, rebuilt right.
    """
    from qlip.jobs.reconstruct import reconstruct_files

    tokenizer = load(model, device, image_size=image_size)
    results, failures = reconstruct_files(tokenizer, paths, out, track("rebuilding"), resize)
    mean = {name: sum(getattr(r, name) for r in results) / max(1, len(results)) for name in ("psnr", "ssim")}
    if json:
        pictures = [asdict(r) for r in results]
        print_json({"pictures": pictures, "mean": mean if results else None, "failed": failures})
    elif results:
        table = Table("picture", "PSNR dB", "SSIM", show_footer=True, box=None, padding=(0, 2, 0, 0))
        for r in results:
            table.add_row(cell(r.path), f"{r.psnr:.2f}", f"{r.ssim:.4f}")
        footers = (f"mean of {len(results)}", f"{mean['psnr']:.2f}", f"{mean['ssim']:.4f}")
        for column, footer in zip(table.columns, footers, strict=True):
            column.footer = footer
        print_table(table)
    if results:
        say(f"{count_pictures(len(results))} beside what was rebuilt, in {out}")
    return finish(len(results), failures, strict)


def classify(
    paths: Paths,
    /,
    *,
    labels: tuple[str, ...],
    templates: tuple[str, ...] = ("a photo of a {}.",),
    top: int = 3,
    model: Model = DEFAULT_MODEL,
    image_size: ImageSize = None,
    resize: HowToResize = "crop",
    device: Device = "auto",
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Say which of some words fits each picture.

    Args:
        paths: Pictures, and folders of them.
        labels: The words, for example "dog" "cat".
        templates: Sentences with {} where the word goes; their embeddings are averaged.
        top: How many words to show for a picture.
    """
    from qlip.jobs.classify import classify_files

    tokenizer = load(model, device, image_size=image_size)
    results, failures = classify_files(tokenizer, paths, labels, templates, track("classifying"), resize)
    if json:
        pictures = [{"path": path, "labels": probabilities} for path, probabilities in results]
        print_json({"pictures": pictures, "failed": failures})
    elif results:
        table = Table("picture", "words", box=None, padding=(0, 2, 0, 0))
        for path, probabilities in results:
            best = list(probabilities.items())[:top]
            table.add_row(cell(path), cell("   ".join(f"{label} {p:.0%}" for label, p in best)))
        print_table(table)
    return finish(len(results), failures, strict)


def demo(*, out: Path = Path("report"), model: Model = DEFAULT_MODEL, device: Device = "auto") -> int:
    """Show what a tokenizer does with a dozen photographs, as a page and in the terminal.

    Args:
        out: Folder for index.html.
    """
    from qlip.demo.report import build, print_summary

    summary = build(load(model, device), out, track("photographs"))
    print_summary(summary, Console())
    return 0
