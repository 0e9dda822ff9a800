r"""Every protocol of `qlip eval` on every held-out set at hand: what docs/results/ shows of the bundled tokenizer.

    python examples/registry_data/build.py --out registry
    python examples/registry_data/evaluation_sets.py --out evaluation-sets
    python benchmarks/evaluations.py qlip-tiny runs/tiny-reconstruction/model runs/tiny-contrastive/model \
        --tiny-imagenet tiny-imagenet --registry registry --evaluation-sets evaluation-sets

Each is a `qlip eval` of its own and leaves its results.json in `--out`; those that are there are not run again.
`docs/write_results.py` then makes pages of them. The folder `--tiny-imagenet` has photographs with labels, 64 × 64
pixels (or any other), as `train*.parquet` and `val*.parquet`, and their `classes.json`.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from qlip.eval.results import FILE
from qlip.model.checkpoint import called
from qlip.recipes.run import TEMPLATES

NUM_FEATURES = 1280  # of EfficientNet-Lite0
DRAWN = ("{}", "an icon of {}", "an emoji of {}", "clip art of {}")


@dataclass(frozen=True)
class Options:
    """What to measure on what.

    Attributes:
        models: bundled names, folders, hub ids.
        tiny_imagenet: folder of photographs with labels.
        registry: what `examples/registry_data/build.py` wrote.
        evaluation_sets: what `examples/registry_data/evaluation_sets.py` wrote.
        out: folder for the results.
        cache: folder for the linear probe's features.
        num_workers: processes that decode.
        rebuilt: pictures of each set that are rebuilt, evenly spread; None: all. If they are fewer than a Fréchet
            distance has features, it is left out.
        classified: pictures of each set that are classified, by words and by the linear probe; None: all.
        compared: photographs of each set that tokenizers and file formats are compared on.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    tiny_imagenet: Path
    registry: Path
    evaluation_sets: Path
    out: Path = Path(__file__).parents[1] / "docs" / "results"
    cache: Path = Path("runs/features")
    num_workers: int = 0
    rebuilt: int | None = None
    classified: int | None = None
    compared: int = 50


def runs(options: Options) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each."""
    photos, sets, drawn = options.tiny_imagenet, options.evaluation_sets, options.registry / "held-out"
    train = [str(path) for path in sorted(photos.glob("train*.parquet"))]
    val = [str(path) for path in sorted(photos.glob("val*.parquet"))]
    photographs = {
        "tiny-imagenet": val,
        "ai-benchmark": [f"{sets}/ai-benchmark.parquet"],
        "endless-sky": [f"{sets}/endless-sky.parquet"],
    }
    labelled = {  # pictures, names of their labels, sentences
        "tiny-imagenet": (val, photos / "classes.json", TEMPLATES),
        "cifar10": ([f"{sets}/cifar10-test.parquet"], sets / "cifar10.json", TEMPLATES),
        "unseen-names": ([f"{drawn}/unseen-names.parquet"], drawn / "unseen-names.json", DRAWN),
        "unseen-style": ([f"{drawn}/unseen-style.parquet"], drawn / "unseen-style.json", DRAWN),
    }
    pictures = photographs | {name: files for name, (files, *_) in labelled.items()}
    rebuilt, classified, compared = map(at_most, (options.rebuilt, options.classified, options.compared))
    if options.rebuilt is not None and options.rebuilt <= NUM_FEATURES:
        rebuilt += ["--features", "none"]
    for model in options.models:
        who, of = called(model), ["--model", model]
        for name, (files, classes, templates) in labelled.items():
            words = ["--classes", str(classes), "--templates", *templates]
            yield f"{who}/zero-shot/{name}", ["zero-shot", *files, *words, *of, *classified]
        yield f"{who}/retrieval/unseen-style", ["retrieval", *pictures["unseen-style"], *of]
        for name, files in pictures.items():
            yield f"{who}/reconstruction/{name}", ["reconstruction", *files, *of, *rebuilt]
        probe = ["--train", *train, "--test", *val, "--cache", str(options.cache)]
        yield f"{who}/linear-probe/tiny-imagenet", ["linear-probe", *probe, *of, *classified]
    for name, files in photographs.items():
        yield f"compare/{name}", ["compare", *files, "--models", *options.models, *compared]


def at_most(count: int | None) -> list[str]:
    """The option that leaves out the rest of a set."""
    return [] if count is None else ["--max-samples", str(count)]


def main() -> None:
    """Run what is not there yet."""
    options = tyro.cli(Options, description=__doc__)
    for name, arguments in runs(options):
        folder = options.out / name
        if (folder / FILE).exists():
            continue
        print(name, flush=True)
        own = ["--out", str(folder), "--num-workers", str(options.num_workers)]
        subprocess.run([sys.executable, "-m", "qlip.cli", "eval", *arguments, *own], check=True)


if __name__ == "__main__":
    main()
