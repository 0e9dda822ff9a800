"""Is this data whole: read through, with what it has and what is broken."""

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlip.data.samples import Fault
from qlip.data.shards import Manifest, read_manifest
from qlip.data.sources import local_files, open_samples
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.files import checksum
from qlip.guarded import inside
from qlip.jobs.data_pack import manifest_folders
from qlip.jobs.data_reading import Look, Seen, read_through

SIDES = (64, 128, 256, 512, 1024)
ASPECTS = (0.5, 0.75, 4 / 3, 2.0)
_SIDE_NAMES = ("under 64", "64 to 127", "128 to 255", "256 to 511", "512 to 1023", "1024 and more")
_ASPECT_NAMES = ("under 1:2", "1:2 to 3:4", "3:4 to 4:3", "4:3 to 2:1", "2:1 and more")


def check(sources: Sequence[str], num_workers: int = 0, track: Track = iter) -> dict[str, Any]:
    """Decode every picture, and compare files with the checksums of their manifest where there is one.

    Args:
        sources: see `qlip.data.sources`.
        num_workers: processes that decode; 0: this one.
        track: shows progress.

    Returns:
        num_samples, num_bytes (of encoded pictures), words (samples with `label`, `caption`, `captions`, or
        "none"), short_sides and aspects (histograms), num_checksums (files compared), broken (key and reason of
        each), duplicates (lists of keys of equal pictures), pictures_per_s, and pictures_per_s_and_core.

    Raises:
        InputError: no source is named, or a manifest is damaged.
    """
    if not sources:
        raise InputError("no data: name at least one source")
    words: Counter[str] = Counter()
    sides, aspects = Counter(dict.fromkeys(_SIDE_NAMES, 0)), Counter(dict.fromkeys(_ASPECT_NAMES, 0))
    broken: list[Fault] = []
    first: dict[bytes, str] = {}
    equal: dict[bytes, list[str]] = {}
    num_checksums = num_bytes = num_samples = 0
    core_s = 0.0
    for source in sources:
        compared = list(_compare(source))
        num_checksums += len(compared)
        broken += filter(None, compared)
    since = time.perf_counter()
    for source in sources:
        try:
            samples = open_samples([source])
        except InputError as error:
            broken.append(Fault(source, str(error).removeprefix(f"{source}: "), is_file=True))
            continue
        broken += samples.unreadable
        for results, seconds in track(read_through(samples, Look(), num_workers)):
            core_s += seconds
            broken += (result for result in results if isinstance(result, Fault))
            for seen in (result for result in results if isinstance(result, Seen)):
                num_samples += 1
                num_bytes += seen.num_bytes
                words.update(seen.record.keys() & {"label", "caption", "captions"} or ["none"])
                sides[_SIDE_NAMES[bisect_right(SIDES, min(seen.width, seen.height))]] += 1
                aspects[_ASPECT_NAMES[bisect_right(ASPECTS, seen.width / seen.height)]] += 1
                if (other := first.setdefault(seen.digest, seen.key)) is not seen.key:
                    equal.setdefault(seen.digest, [other]).append(seen.key)
    elapsed_s = time.perf_counter() - since
    return {
        "num_samples": num_samples,
        "num_bytes": num_bytes,
        "words": dict(sorted(words.items())),
        "short_sides": dict(sides),
        "aspects": dict(aspects),
        "num_checksums": num_checksums,
        "broken": [asdict(fault) for fault in broken],
        "duplicates": list(equal.values()),
        "pictures_per_s": round(num_samples / max(elapsed_s, 1e-9), 1),
        "pictures_per_s_and_core": round(num_samples / max(core_s, 1e-9), 1),
    }


def _compare(source: str) -> Iterator[Fault | None]:
    """For each of the source's files in a manifest what is wrong with it."""
    for folder in manifest_folders(source):
        manifest = read_manifest(folder, Manifest)
        for name, expected in (manifest.sha256 if manifest else {}).items():
            file = inside(folder, name)
            if not _belongs(file, source):
                continue
            if not file.exists():
                yield Fault(str(file), "is missing, but in the manifest", is_file=True)
            elif checksum(file) != expected:
                yield Fault(str(file), "its bytes are not those that the manifest names", is_file=True)
            else:
                yield None


def _belongs(file: Path, source: str) -> bool:
    path = Path(source).absolute()
    if path.is_dir():
        return file.is_relative_to(path)
    return file in {Path(name).absolute() for name in local_files(source)}
