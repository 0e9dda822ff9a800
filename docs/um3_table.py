"""The page that has UM3's numbers beside the paper's Table 5; `write_results.py` writes it."""

from collections.abc import Sequence
from typing import Any

PROTOCOLS = ("um3-text", "captions", "t2i")  # the third measures other models, too

# column → the protocol that measures it, what it calls the numbers, times what, and the paper's UM3 of 1.5 B
COLUMNS = {
    "ARC-C": ("um3-text", ("arc_challenge_acc", "arc_challenge_acc_norm"), 100, "34.30"),
    "HellaSwag": ("um3-text", ("hellaswag_acc", "hellaswag_acc_norm"), 100, "45.35"),
    "PIQA": ("um3-text", ("piqa_acc", "piqa_acc_norm"), 100, "74.65"),
    "SIQA": ("um3-text", ("social_iqa_acc",), 100, "43.09"),
    "WinoGrande": ("um3-text", ("winogrande_acc",), 100, "54.22"),
    "BLEU@4": ("captions", ("bleu4",), 100, "8.6"),
    "METEOR": ("captions", ("meteor",), 100, "20.2"),
    "CIDEr": ("captions", ("cider",), 100, "17.3"),
    "gFID": ("t2i", ("gfid",), 1, "44.1"),
    "CLIPScore": ("t2i", ("clip_score",), 1, ".250"),
}


def page(found: Sequence[dict[str, Any]]) -> str:
    """All models that were measured as UM3 is, a row each, and the paper's, Markdown.

    Args:
        found: results of `PROTOCOLS`. A model is known by its name, and of t2i those alone that another protocol
            measured, too; of two results of one protocol and name each has a row.
    """
    names = {name for result in found if result["protocol"] != "t2i" for name in _models(result)}
    rows: list[tuple[str, dict[str, dict[str, Any]]]] = []
    for result in found:
        for name in filter(names.__contains__, _models(result)):
            free = [row for who, row in rows if who == name and result["protocol"] not in row]
            if not free:
                free.append({})
                rows.append((name, free[0]))
            free[0][result["protocol"]] = result
    lines = [f"| | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, by in rows:
        lines.append(f"| {name} | {' | '.join(_cell(name, by, *column[:3]) for column in COLUMNS.values())} |")
    lines.append(f"| the paper's UM3, 1.5 B | {' | '.join(column[3] for column in COLUMNS.values())} |")
    notes = [_note(name, result) for name, by in rows for result in by.values()]
    words = (
        "Written by `docs/write_results.py`. Language in per cent: acc / acc_norm where lm-eval has both (the "
        "paper does not say which it prints); BLEU@4, METEOR and CIDEr times 100. How each is measured: "
        "[um3-evaluation.md](../um3-evaluation.md)."
    )
    return "\n\n".join(["# UM3, beside the paper's Table 5", words, "\n".join(lines), "\n".join(notes)]) + "\n"


def _models(result: dict[str, Any]) -> list[str]:
    return [model["name"] for model in result["models"] if model["name"] in result["results"]]


def _cell(name: str, by: dict[str, dict[str, Any]], protocol: str, numbers: Sequence[str], times: int) -> str:
    found = by.get(protocol, {}).get("results", {}).get(name, {})
    values = [found[number]["value"] * times for number in numbers if number in found]
    return " / ".join(f"{value:.3f}" if numbers == ("clip_score",) else f"{value:.2f}" for value in values)


def _note(name: str, result: dict[str, Any]) -> str:
    data, used = result["data"], result["environment"]
    limit = result["settings"].get("limit")
    count = f"the first {limit} of each" if limit else f"{data['num_samples']:,}"
    words = result["settings"].get("tokenization")
    return (
        f"- {name}, {result['protocol']}: {', '.join(data['sources'])}, {count} (data `{data['hash']}`)"
        f"{f'; words: {words}' if words else ''}; {used['hardware']}, torch {used['torch']}, commit "
        f"`{used['commit']}`; `{result['command']}`"
    )
