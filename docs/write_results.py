"""Writes a page for each protocol from every `results.json` below docs/results: `python docs/write_results.py`.

`qlip eval PROTOCOL … --out docs/results/NAME` leaves such a file. Runs on the same data stand in one table, the
paper's numbers (docs/paper.md section 6) below.
"""

from pathlib import Path
from typing import Any

import um3_table

from qlip.errors import InputError
from qlip.eval.results import FILE, label, read_results, shown, title

ROOT = Path(__file__).parent / "results"

# On ImageNet-1k: what the paper's tables print.
PAPER = {
    "zero-shot": """\
| the paper, ImageNet-1k | top-1 |
| --- | --- |
| QLIP-B/16 | 74.3% |
| QLIP-B/8 | 75.6% |
| QLIP-L/14 @392 | 79.1% |""",
    "reconstruction": """\
| the paper, ImageNet-1k | bits an image | PSNR, dB | SSIM | rFID |
| --- | --- | --- | --- | --- |
| QLIP-B/16 | 7,168 | 23.16 | 0.6286 | 3.21 |
| QLIP-B/8 | 28,672 | 26.79 | 0.7905 | 0.70 |
| QLIP-L/14 @392 | 21,952 | 25.36 | 0.6903 | 1.46 |
| BSQ-ViT B/16, reproduced | | 24.12 | 0.6638 | 3.81 |""",
    "linear-probe": """\
| the paper, ImageNet-1k | CLS | mean of patches | both |
| --- | --- | --- | --- |
| EVA-CLIP-B | 82.7% | | |
| QLIP-B/16 | 81.8% | 77.7% | 82.1% |
| BSQ-ViT B/16 | 29.3% | 25.4% | |
| EVA-CLIP-L | 86.3% | | |
| QLIP-L/14 @392 | 85.2% | | |""",
    "t2i": """\
| the paper, Table 7: LlamaGen-XL, COCO-30k | gFID | CLIPScore | GenEval | DPG-Bench |
| --- | --- | --- | --- | --- |
| on VQGAN's tokens | 15.68 | .309 | .32 | 43.22 |
| on BSQ-ViT's | 19.03 | .303 | .31 | 34.03 |
| on QLIP's | 15.29 | .316 | .48 | 78.17 |""",
}


def page(protocol: str, found: list[dict[str, Any]]) -> str:
    """All runs of a protocol, Markdown."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        data = result["data"]
        where = f"{title(result)}: {data['num_samples']:,} pictures, data `{data['hash']}`"
        groups.setdefault(where, []).append(result)
    parts = [f"# {protocol}", "Written by `docs/write_results.py`. In brackets the 95 % bootstrap interval."]
    parts += [f"## {where}\n\n{table(results)}" for where, results in sorted(groups.items())]
    if protocol in PAPER:
        parts.append(f"## Beside it\n\n{PAPER[protocol]}")
    return "\n\n".join(parts) + "\n"


def table(found: list[dict[str, Any]]) -> str:
    """Runs on the same data: a row for each tokenizer or file, and below how each was made."""
    rows = {(i, who): n for i, r in enumerate(found) for who, n in r["results"].items() if " quality " not in who}
    names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    lines = ["| | " + " | ".join(map(label, names)) + " |", "| --- " * (len(names) + 1) + "|"]
    for (_, who), numbers in rows.items():
        cells = (shown(name, numbers[name]) if name in numbers else "" for name in names)
        lines.append(f"| {who} | {' | '.join(cells)} |")
    lines.append("")
    for result in found:
        used, ids = result["environment"], ", ".join(f"{m['name']} `{m['id_hash']}`" for m in result["models"])
        where = f"{used['hardware']}, torch {used['torch']}, commit `{used['commit']}`"
        lines.append(f"- {ids}: {result['models'][0]['dtype']}, {where}; `{result['command']}`")
    return "\n".join(lines)


def main() -> None:
    """Write the pages."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(ROOT.rglob(FILE)):
        try:
            result = read_results(path)
        except InputError as error:
            print(error)
            continue
        found.setdefault(result["protocol"], []).append(result)
    um3 = [result for protocol in um3_table.PROTOCOLS for result in found.get(protocol, [])]
    if um3:
        (ROOT / "um3.md").write_text(um3_table.page(um3), encoding="utf-8")
    for protocol in ("um3-text", "captions"):  # they are on that page alone
        found.pop(protocol, None)
    for protocol, results in found.items():
        (ROOT / f"{protocol}.md").write_text(page(protocol, results), encoding="utf-8")
        print(f"{len(results)} runs in {ROOT / f'{protocol}.md'}")


if __name__ == "__main__":
    main()
