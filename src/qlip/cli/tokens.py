"""Commands on token files: are they whole, and what is in them."""

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from qlip.cli.options import Group, Json, Paths, err, finish, print_json, print_table, say, track


def verify(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")], /, *, json: Json = False
) -> int:
    """Read every id of token files, and compare a folder with the checksums and counts of its manifest.

    Args:
        path: A folder or a file that `qlip tokenize` wrote.
    """
    from qlip.jobs.tokens_check import verify as run_verify

    found = run_verify(path, track("reading"))
    if json:
        print_json(found)
    failed = f"; {found['num_failures']:,} samples could not be used" if found["num_failures"] else ""
    say(f"{found['num_rows']:,} rows in {found['num_shards']:,} shards{failed}")
    return finish(found["num_shards"], [f"{f['key']}: {f['reason']}" for f in found["broken"]], strict=True)


def stats(paths: Paths, /, *, group_bits: int | None = None, json: Json = False) -> int:
    """Show how ids are used: entropy of bits and groups, correlations, duplicates.

    Args:
        paths: Token files, and folders of them.
        group_bits: Bits of a group, such as a language model's sub-token; by default the most up to 16.
    """
    from qlip.jobs.tokens_check import stats as run_stats

    found = run_stats(paths, group_bits, track("counting"))
    if json:
        print_json(found)
        return 0
    print_table(_table(found))
    for keys in found["duplicates"][:10]:
        err.print("  the same tokens: " + ", ".join(keys[:5]), highlight=False, markup=False, soft_wrap=True)
    return 0


tokens = Group(
    "Check token files, or show how their ids are used.",
    {
        "verify": verify,
        "stats": stats,
    },
)


def _table(found: dict[str, Any]) -> Table:
    rows, columns = found["format"]["grid"]
    bits, groups, pairs = found["bit_entropy"], found["group_entropy"], found["correlation"]["largest"]
    lines = {
        "rows": f"{found['num_rows']:,} of {rows} × {columns} tokens, {len(bits)} bits each",
        "different ids": f"{found['distinct_tokens']:,} in {found['num_tokens']:,} tokens, "
        f"{found['codes_used']:.3g} of all codes",
        "entropy of the bits": f"{sum(bits):.2f} of {len(bits)}; each {min(bits):.3f} to {max(bits):.3f}",
        f"entropy of groups of {found['group_bits']}": f"{sum(groups):.2f} of {len(bits)}; each "
        + ", ".join(f"{value:.2f}" for value in groups),
        "correlation of two bits": f"{found['correlation']['mean']:.4f} in the mean; the largest "
        + ", ".join(f"{pair['first']}–{pair['second']}: {pair['value']:+.3f}" for pair in pairs[:3]),
        "same as another": f"{found['num_duplicates']:,}",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in lines.items():
        table.add_row(f"[bold]{name}", text)
    return table
