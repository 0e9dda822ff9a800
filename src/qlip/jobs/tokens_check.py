"""Are token files whole, and what is in them."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlip.data.samples import Fault
from qlip.data.token_file import (
    MANIFEST,
    TokenFiles,
    TokenFormat,
    is_as_written,
    read_origin,
    read_token_manifest,
)
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.files import checksum
from qlip.guarded import inside

BATCH = 500  # rows that are looked at together
MOST_GROUP_BITS = 16


def verify(path: Path, track: Track = iter) -> dict[str, Any]:
    """Read every id of token files, and compare a folder of them with its manifest.

    Args:
        path: a folder that `qlip tokenize` wrote, or one token file, of which its own checksums are compared.
        track: shows progress.

    Returns:
        num_shards, num_rows, num_failures (samples that could not be used when it was made), and broken: key and
        reason of each file that is not what the manifest says.

    Raises:
        InputError: the folder has no manifest.
    """
    return _verify_folder(path, track) if path.is_dir() else _verify_file(path, track)


def _verify_file(file: Path, track: Track) -> dict[str, Any]:
    source = TokenFiles.open([file])
    fault, num_rows = _read_through(source, track)
    if not fault and not is_as_written(file):
        fault = "its bytes are not those that `qlip tokenize` wrote: it is damaged, or another program wrote it"
    return {
        "num_shards": 1,
        "num_rows": num_rows,
        "num_failures": len(read_origin(file).get("failures", ())),
        "broken": [asdict(Fault(str(file), fault, is_file=True))] if fault else [],
    }


def _verify_folder(folder: Path, track: Track) -> dict[str, Any]:
    manifest = read_token_manifest(folder)
    if manifest is None:
        raise InputError(
            f"{folder} has no {MANIFEST} of tokens: start its `qlip tokenize` again, which writes it at the end"
        )
    shards = {shard.name: shard.num_rows for shard in manifest.shards}
    broken = [Fault(f.key, f"is not tokenized: {f.reason}", is_file=True) for f in manifest.lost]
    for name, num_rows in track(shards.items()):
        if fault := _fault(inside(folder, name), num_rows, manifest.sha256.get(name), manifest.format):
            broken.append(Fault(str(folder / name), fault, is_file=True))
    for file in sorted(folder.glob("*.parquet")):
        if file.name not in shards:
            broken.append(Fault(str(file), "is not in the manifest", is_file=True))
    return {
        "num_shards": len(shards),
        "num_rows": sum(shards.values()),
        "num_failures": len(manifest.failures),
        "broken": [asdict(fault) for fault in broken],
    }


def _fault(file: Path, num_rows: int, expected: str | None, described: TokenFormat) -> str:
    """What is wrong with a file; empty if nothing is."""
    if not file.exists():
        return "is missing, but in the manifest"
    if checksum(file) != expected:
        return "its bytes are not those that the manifest names: delete it and start `qlip tokenize` again"
    try:
        source = TokenFiles.open([file])
    except InputError as error:
        return str(error).removeprefix(f"{file}: ")
    fault, found = _read_through(source)
    if fault:
        return fault
    if found != num_rows:
        return f"has {found:,} rows, the manifest says {num_rows:,}"
    if source.format.id_hash != described.id_hash:
        return f"holds ids {source.format.id_hash}, the manifest says {described.id_hash}"
    return ""


def _read_through(source: TokenFiles, track: Track = iter) -> tuple[str, int]:
    """What is wrong with the rows of one file (empty if nothing is), and how many were read."""
    found = 0
    try:
        for keys, ids in track(source.batches(BATCH)):
            found += len(keys)
            if None in keys:
                return "a row has no key", found
            if ids.size and int(ids.max()) >> source.format.bits:
                return f"has ids of more than {source.format.bits} bits", found
    except InputError as error:
        return str(error).removeprefix(f"{source.files[0]}: "), found
    return "", found


@dataclass(frozen=True)
class _Bits:
    """The bits of many tokens, counted.

    Attributes:
        num_tokens: of which.
        ones: (L,) how often each bit is 1.
        both: (L, L) how often two are.
        groups: (L / h, 2^h) how often each group has each value.
    """

    num_tokens: int
    ones: np.ndarray
    both: np.ndarray
    groups: np.ndarray


def stats(paths: Sequence[Path], group_bits: int | None = None, track: Track = iter) -> dict[str, Any]:
    """How the ids of token files are used.

    Args:
        paths: token files, or folders of them.
        group_bits: h, bits of a group, neighbours from the first on; None: the most up to 16 that divide a token.
        track: shows progress.

    Returns:
        `format`; num_rows, num_tokens; distinct_tokens (different ids), codes_used (their share of all 2^L);
        bit_entropy and bit_ones (L each: bits, and share of ones), group_bits, group_entropy (L / h of them, in
        bits), correlation (the mean of the absolute values between two bits, and the `largest`: first, second,
        value);
        duplicates (lists of keys of equal rows) and num_duplicates (rows that repeat an earlier one).

    Raises:
        InputError: no token files, a damaged one, several tokenizers, `group_bits` that do not divide a token, or
            no rows.
    """
    source = TokenFiles.open(paths)
    width = source.format.bits
    size = group_bits or max(h for h in range(1, MOST_GROUP_BITS + 1) if width % h == 0)
    if not 1 <= size <= MOST_GROUP_BITS or width % size:
        fit = [h for h in range(1, MOST_GROUP_BITS + 1) if width % h == 0]
        raise InputError(f"group_bits={size} does not divide the token's {width} bits: use one of {fit}")
    counted = _Bits(0, np.zeros(width), np.zeros((width, width)), np.zeros((width // size, 1 << size), np.int64))
    distinct = _Distinct()
    first: dict[bytes, str] = {}
    equal: dict[bytes, list[str]] = {}
    for keys, ids in track(source.batches(BATCH)):
        if ids.size and int(ids.max()) >> width:
            raise InputError(f"an id has more than the {width} bits of its tokenizer: see `qlip tokens verify`")
        counted = _count(counted, ids.reshape(-1), size)
        distinct.add(ids)
        for key, row in zip(keys, ids, strict=True):
            key = "(no key)" if key is None else key
            digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            if digest in first:
                equal.setdefault(digest, [first[digest]]).append(key)
            else:
                first[digest] = key
    if not first:
        raise InputError(f"{source.files[0]}: no rows to count")
    repeated = sum(len(keys) - 1 for keys in equal.values())
    return {
        "format": source.format.describe(),
        "num_rows": len(first) + repeated,
        "num_tokens": counted.num_tokens,
        "distinct_tokens": len(distinct),
        "codes_used": len(distinct) / 2**width,
        **_entropies(counted, size),
        "correlation": _correlation(counted),
        "num_duplicates": repeated,
        "duplicates": list(equal.values()),
    }


class _Distinct:
    """How many different ids there are. What is new is merged when it is as much as what is known."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.uint64)
        self._new: list[np.ndarray] = []

    def add(self, ids: np.ndarray) -> None:
        self._new.append(np.unique(ids).astype(np.uint64))
        if sum(map(len, self._new)) > len(self._known):
            len(self)

    def __len__(self) -> int:
        self._known, self._new = np.unique(np.concatenate([self._known, *self._new])), []
        return len(self._known)


def _count(counted: _Bits, ids: np.ndarray, size: int) -> _Bits:
    width, num_groups = len(counted.ones), len(counted.groups)
    ids = ids.astype(np.uint64)
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint64)
    bits = ((ids[:, None] >> shifts) & np.uint64(1)).astype(np.float32)
    values = [(ids >> np.uint64(width - (i + 1) * size)) & np.uint64((1 << size) - 1) for i in range(num_groups)]
    counts = [np.bincount(value.astype(np.int64), minlength=1 << size) for value in values]
    # `bits.T @ bits` is exact: float32 counts up to 2^24, and a batch of rows has fewer tokens
    return _Bits(
        counted.num_tokens + len(ids),
        counted.ones + bits.sum(0, dtype=np.float64),
        counted.both + (bits.T @ bits),
        counted.groups + np.stack(counts),
    )


def _entropies(counted: _Bits, size: int) -> dict[str, Any]:
    ones = counted.ones / counted.num_tokens
    groups = counted.groups / counted.num_tokens
    return {
        "bit_ones": ones.tolist(),
        "bit_entropy": _entropy(np.stack([ones, 1 - ones], -1)).tolist(),
        "group_bits": size,
        "group_entropy": _entropy(groups).tolist(),
    }


def _entropy(shares: np.ndarray) -> np.ndarray:
    """(..., K) → (...), in bits."""
    return -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(-1) + 0.0


def _correlation(counted: _Bits) -> dict[str, Any]:
    """Of bits that are not always the same."""
    ones = counted.ones / counted.num_tokens
    deviation = np.sqrt(ones * (1 - ones))
    with np.errstate(divide="ignore", invalid="ignore"):
        matrix = (counted.both / counted.num_tokens - np.outer(ones, ones)) / np.outer(deviation, deviation)
    pairs = [(i, j, float(matrix[i, j])) for i, j in _pairs(len(ones)) if np.isfinite(matrix[i, j])]
    largest = sorted(pairs, key=lambda pair: -abs(pair[2]))[:10]
    mean = float(np.mean([abs(value) for *_, value in pairs])) if pairs else 0.0
    return {"mean": mean, "largest": [{"first": i, "second": j, "value": value} for i, j, value in largest]}


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    return itertools.combinations(range(count), 2)
