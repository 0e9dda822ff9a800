"""Any data as shards with a manifest."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlip.data.samples import Fault
from qlip.data.shards import MANIFEST, Manifest, Shard, add_sample, read_manifest
from qlip.data.sources import open_samples
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.files import checksum, whole_file, write_json
from qlip.jobs.data_reading import Look, Seen, read_through


def pack(
    sources: Sequence[str],
    out: Path,
    size: int | None = None,
    shard_rows: int = 10_000,
    shard_bytes: int = 1 << 30,
    licence: str | None = None,
    num_workers: int = 0,
    track: Track = iter,
) -> dict[str, Any]:
    """Write `out/shard-00000.tar`, … and `out/manifest.json`, which comes last and ends the work.

    Pictures that cannot be decoded are left out and listed in the manifest. The same data make the same bytes.

    Args:
        sources: see `qlip.data.sources`.
        out: a new folder.
        size: pixels that short sides have at most; larger pictures are made smaller. None: every picture's bytes
            stay as they are.
        shard_rows: samples in a shard, at most.
        shard_bytes: after which a shard ends.
        licence: of the data; None: what the manifests of the sources say.
        num_workers: processes that decode; 0: this one.
        track: shows progress.

    Returns:
        the manifest.

    Raises:
        InputError: `out` has shards, a number is too small, or there is nothing to pack.
    """
    for name, value in {"size": size, "shard_rows": shard_rows, "shard_bytes": shard_bytes}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    _clear(out)
    samples = open_samples(sources)
    counts: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    faults = list(samples.unreadable)

    def good() -> Iterator[Seen]:
        for results, _ in track(read_through(samples, Look(keep=True, size=size), num_workers)):
            for result in results:
                if isinstance(result, Fault):
                    faults.append(result)
                    continue
                counts.update(result.record.keys() & {"label", "caption", "captions"})
                licences.update(
                    [str(result.record.get("licence") or result.record.get("license") or "not stated")]
                )
                yield result

    write_json(out / MANIFEST, {"complete": False})
    shards = _write_shards(good(), out, shard_rows, shard_bytes)
    if not shards:
        (out / MANIFEST).unlink()
        reason = f" ({faults[0].reason})" if faults else ""
        raise InputError(f"{sources[0]}: no picture can be read{reason}")
    for shard in shards:
        Shard(out / shard["name"])  # leaves its index
    manifests = [read_manifest(folder, Manifest) for source in sources for folder in manifest_folders(source)]
    of_sources = {found.licence for found in manifests if found and found.licence}
    manifest = {
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "words": dict(sorted(counts.items())),
        "licence": licence or "; ".join(sorted(of_sources)) or None,
        "licences_of_samples": dict(sorted(licences.items())),
        "class_names": list(samples.class_names),
        "sources": [source if ":" in source else Path(source).name for source in sources],
        "size": size,
        "shards": shards,
        "sha256": {shard["name"]: checksum(out / shard["name"]) for shard in shards},
        "skipped": [asdict(fault) for fault in faults],
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def _clear(out: Path) -> None:
    """Delete what a killed run left.

    Raises:
        InputError: there are shards of another kind.
    """
    manifest = read_manifest(out, Manifest)
    if manifest and not manifest.complete:
        for file in (*out.glob("shard-*.tar"), *out.glob("shard-*.tar.index")):
            file.unlink()
    elif manifest or list(out.glob("*.tar")):
        raise InputError(f"{out} already holds shards: choose another --out, or delete them first")


def _write_shards(pictures: Iterator[Seen], out: Path, rows: int, num_bytes: int) -> list[dict[str, Any]]:
    """Write one shard after the other; each appears when it is whole."""
    shards: list[dict[str, Any]] = []
    with ExitStack() as stack:
        tar: tarfile.TarFile | None = None
        for number, seen in enumerate(pictures):
            if tar is None or shards[-1]["num_samples"] == rows or tar.offset >= num_bytes:
                stack.close()
                shards.append({"name": f"shard-{len(shards):05d}.tar", "num_samples": 0})
                unfinished = stack.enter_context(whole_file(out / shards[-1]["name"]))
                tar = stack.enter_context(tarfile.open(unfinished, "w"))
            add_sample(tar, number, seen.image, seen.suffix, {"key": seen.key} | seen.record)
            shards[-1]["num_samples"] += 1
    return [shard | {"num_bytes": (out / shard["name"]).stat().st_size} for shard in shards]


def manifest_folders(source: str) -> Iterator[Path]:
    """Where the manifest of a source may be: in its folder, or in the one above."""
    if "://" not in source and not source.startswith("datasets:"):
        path = Path(source).absolute()
        folder = path if path.is_dir() else path.parent
        yield from (folder, folder.parent)
