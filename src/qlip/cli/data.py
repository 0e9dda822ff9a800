"""Commands on data: into shards, and is it whole."""

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from qlip.cli.options import AT_LEAST_ONE, Group, Json, err, finish, print_json, print_table, say, track
from qlip.machine import num_cores

Sources = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="SOURCE…",
        help_behavior_hint=AT_LEAST_ONE,
        help="Files, folders, URLs of shards, datasets:NAME; see docs/data.md.",
    ),
]
Workers = Annotated[
    int | None, tyro.conf.arg(help="Processes that decode; by default as many as there are cores.")
]


def pack(
    sources: Sources,
    /,
    *,
    out: Path,
    size: int | None = None,
    shard_rows: int = 10_000,
    shard_bytes: int = 1 << 30,
    licence: str | None = None,
    num_workers: Workers = None,
) -> int:
    """Write WebDataset shards with a manifest: counts, checksums, licence.

    Args:
        out: A new folder.
        size: Pixels that short sides have at most; larger pictures are made smaller (JPEG, quality 95).
        shard_rows: Samples in a shard, at most.
        shard_bytes: After which a shard ends.
        licence: Of the data; by default what the manifests of the sources say.
    """
    from qlip.jobs.data_pack import pack as run_pack

    watch = track("packing")
    made = run_pack(sources, out, size, shard_rows, shard_bytes, licence, _workers(num_workers), watch)
    say(f"{made['num_samples']:,} samples in {len(made['shards'])} shards in {out}")
    if not made["licence"]:
        say("no source states a licence: pack with --licence, so that whoever has the shards knows theirs")
    return finish(made["num_samples"], _lines(made["skipped"]), strict=False)


def check(
    sources: Sources,
    /,
    *,
    num_workers: Workers = None,
    json: Json = False,
) -> int:
    """Read data through: counts, sizes, words, duplicates, checksums, speed. Exit code 1 if anything is broken."""
    from qlip.jobs.data_check import check as run_check

    found = run_check(sources, _workers(num_workers), track("reading"))
    if json:
        print_json(found)
    else:
        print_table(_table(found))
        for keys in found["duplicates"][:10]:
            err.print("  the same picture: " + ", ".join(keys[:5]), highlight=False, markup=False, soft_wrap=True)
    return finish(found["num_samples"], _lines(found["broken"]), strict=True)


data = Group(
    "Pack pictures and words of any source into shards, or check that they are whole.",
    {
        "pack": pack,
        "check": check,
    },
)


def _table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    repeated = sum(len(keys) - 1 for keys in found["duplicates"])
    rows = {
        "samples": f"{found['num_samples']:,}, {found['num_bytes'] / 2**20:,.1f} MiB of pictures",
        "words": _counts(found["words"]),
        "short side, pixels": _counts(found["short_sides"]),
        "width : height": _counts(found["aspects"]),
        "same as another": f"{repeated:,}",
        "files as in their manifest": f"{found['num_checksums']:,} compared",
        "broken": f"{len(found['broken']):,}",
        "speed": f"{found['pictures_per_s']:,} pictures/s, {found['pictures_per_s_and_core']:,} a core",
    }
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    return table


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items() if count) or "none"


def _lines(faults: list[dict[str, Any]]) -> list[str]:
    return [f"{fault['key']}: {fault['reason']}" for fault in faults]


def _workers(number: int | None) -> int:
    return num_cores() if number is None else number
