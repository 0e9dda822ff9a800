import json
import math

import pytest

from qlip.errors import InputError
from qlip.eval.interval import Number
from qlip.eval.results import read_results, record, shown, update_card, write_results


def made(value=0.25, sources=("val.parquet",), protocol="zero-shot"):
    return record(
        protocol,
        [{"name": "mine", "id_hash": "0123", "dtype": "float32"}],
        {"sources": list(sources), "num_samples": 1200, "hash": "abcd", "failed": ["x.png: broken"]},
        {"resize": "crop"},
        {"mine": {"top1": Number(value, value - 0.01, value + 0.01), "bits_per_image": Number(1792)}},
        "cpu",
    )


def test_results_come_back_and_say_what_they_are_of(tmp_path):
    found = read_results(write_results(tmp_path / "new", made()))
    assert found["results"]["mine"] == {
        "top1": {"value": 0.25, "low": 0.24, "high": 0.26},
        "bits_per_image": {"value": 1792},
    }
    assert found["data"]["hash"] == "abcd" and found["models"][0]["id_hash"] == "0123"
    assert {"hardware", "torch", "numpy", "pillow", "commit", "device", "processes"} <= found["environment"].keys()


def test_an_infinite_number_is_valid_json(tmp_path):
    """PSNR, where a picture came back as it was."""
    path = write_results(tmp_path, made(math.inf))
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert shown("psnr", read_results(path)["results"]["mine"]["top1"]) == "inf (inf to inf)"


def test_numbers_are_shown_with_their_intervals():
    assert shown("top1", {"value": 0.123456, "low": 0.1, "high": 0.2}) == "12.35% (10.00% to 20.00%)"
    assert shown("bits_per_image", {"value": 1792}) == "1,792"


def test_other_files_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"results": {}}')
    with pytest.raises(InputError, match="not the results of an evaluation"):
        read_results(tmp_path / "results.json")


def test_the_card_gets_a_section_for_each_protocol_and_data_set(tmp_path):
    (tmp_path / "README.md").write_text("# mine\n\nWords.\n")
    for found in (made(0.25), made(0.5, ["other"]), made(0.75)):
        update_card(tmp_path, found)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# mine\n\nWords.\n\n") and card.count("## Evaluation: zero-shot on") == 2
    assert "75.00%" in card and "50.00%" in card and "25.00%" not in card
    assert "1,200 pictures (data `abcd`, 1 more could not be used)" in card and "| bits an image | 1,792 |" in card
    update_card(tmp_path, made(0.75))
    assert (tmp_path / "README.md").read_text() == card


def test_a_model_without_a_card_gets_one(tmp_path):
    update_card(tmp_path, made())
    assert (tmp_path / "README.md").read_text().startswith(f"# {tmp_path.name}\n")
