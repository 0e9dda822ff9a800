"""`qlip data pack` and `qlip data check`: what goes in comes out, and what is broken is found."""

import datetime
import io
import json
import tarfile
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.conftest import encoded

from qlip.data.sources import open_samples
from qlip.errors import InputError
from qlip.jobs.data_check import check
from qlip.jobs.data_pack import pack

COUNT = 30
WORDS = [{"caption": "a “cat”\nin two lines"}, {"captions": ["a dog", "his dog"]}, {"label": 2}, {}]


@pytest.fixture
def source(tmp_path):
    """A Parquet file of 30 pictures with words of every kind, and its manifest."""
    rows = []
    for i in range(COUNT):
        row = dict.fromkeys(("caption", "captions", "label")) | WORDS[i % 4]
        rows.append(
            row | {"image": {"bytes": encoded(i % 4, i, 16 + i), "path": None}, "licence": "CC0", "author": "me"}
        )
    (tmp_path / "source").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "source" / "a.parquet")
    (tmp_path / "source" / "manifest.json").write_text('{"licence": "CC0-1.0"}')
    return str(tmp_path / "source")


def without_key(sample):
    return {name: value for name, value in sample.items() if name != "key"}


def flip(path, place):
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("num_workers", (0, 2))
def test_what_is_packed_comes_out_as_it_went_in(source, tmp_path, num_workers):
    made = pack([source], tmp_path / "s", shard_rows=12, num_workers=num_workers)
    assert [shard["num_samples"] for shard in made["shards"]] == [12, 12, 6]
    assert made == json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert made["num_samples"] == COUNT and made["licence"] == "CC0-1.0" and not made["skipped"]
    assert made["licences_of_samples"] == {"CC0": COUNT}
    assert made["words"] == {"caption": 8, "captions": 8, "label": 7}
    before, after = open_samples([source]), open_samples([tmp_path / "s"])
    assert [without_key(sample) for sample in after] == [without_key(sample) for sample in before]
    with tarfile.open(tmp_path / "s" / "shard-00000.tar") as tar:  # as others read them
        names = tar.getnames()
        assert names[:3] == ["00000000.png", "00000000.json", "00000000.txt"] and "00000002.cls" in names
        assert tar.extractfile("00000001.txt").read() == b"a dog"
        assert json.load(tar.extractfile("00000001.json"))["key"] == "a.parquet:1"
    again = pack([source], tmp_path / "t", shard_rows=12)
    assert again["sha256"] == made["sha256"]


def test_smaller_pictures_and_shards_of_a_size(source, tmp_path):
    made = pack([source], tmp_path / "s", size=20, shard_bytes=20_000, licence="MIT")
    assert made["licence"] == "MIT" and made["size"] == 20
    sizes = [shard["num_bytes"] for shard in made["shards"]]
    assert len(sizes) > 2 and all(20_000 <= size <= 40_000 for size in sizes[:-1])
    before, after = open_samples([source]), open_samples([tmp_path / "s"])
    sides = [Image.open(io.BytesIO(sample["image"])).size for sample in after]
    assert sides == [(min(16 + i, 20),) * 2 for i in range(COUNT)]
    assert all((a["image"] == b["image"]) == (i <= 4) for i, (a, b) in enumerate(zip(before, after, strict=True)))


def test_names_of_classes_survive(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "1.png").write_bytes(encoded(0, ord(name[0])))
    pack([str(tmp_path / "p")], tmp_path / "s")
    samples = open_samples([tmp_path / "s"])
    assert samples.class_names == ("cat", "dog") and [sample["label"] for sample in samples] == [0, 1]


def test_what_cannot_be_decoded_is_left_out_and_listed(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encoded(0, i)[: 400 if i == 3 else None])
    made = pack([str(tmp_path)], tmp_path / "s")
    assert made["num_samples"] == 4 and [fault["key"] for fault in made["skipped"]] == ["3.png"]
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="no picture can be read"):
        pack([str(tmp_path)], tmp_path / "t")


def test_nothing_half_has_a_final_name(source, tmp_path, monkeypatch):
    from qlip.jobs import data_pack

    written = data_pack.add_sample

    def fail_at_20(tar, number, *rest):
        if number == 20:
            raise KeyboardInterrupt
        written(tar, number, *rest)

    monkeypatch.setattr(data_pack, "add_sample", fail_at_20)
    with pytest.raises(KeyboardInterrupt):
        pack([source], tmp_path / "s", shard_rows=12)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"shard-00000.tar", "manifest.json"}
    for rest in ("s", "s/shard-00000.tar"):
        with pytest.raises(InputError, match="`qlip data pack` has not finished here: start it again"):
            open_samples([tmp_path / rest])
    monkeypatch.setattr(data_pack, "add_sample", written)
    assert pack([source], tmp_path / "s")["num_samples"] == len(open_samples([tmp_path / "s"]))
    assert len(list((tmp_path / "s").glob("*.tar"))) == 1
    with pytest.raises(InputError, match="already holds shards"):
        pack([source], tmp_path / "s")
    with pytest.raises(InputError, match="size is 0"):
        pack([source], tmp_path / "t", size=0)


@pytest.mark.parametrize("num_workers", (0, 2))
def test_good_data_is_described(source, tmp_path, num_workers):
    pack([source], tmp_path / "s", shard_rows=12)
    found = check([source, str(tmp_path / "s")], num_workers)
    assert found["num_samples"] == 2 * COUNT and not found["broken"]
    assert found["words"] == {"caption": 16, "captions": 16, "label": 14, "none": 14}
    assert found["short_sides"]["under 64"] == 2 * COUNT and found["aspects"]["3:4 to 4:3"] == 2 * COUNT
    assert found["num_checksums"] == 3
    assert (
        found["duplicates"][0] == ["a.parquet:0", "shard-00000.tar/00000000"] and len(found["duplicates"]) == COUNT
    )
    assert found["pictures_per_s"] > 0 and found["pictures_per_s_and_core"] > 0


def test_sizes_and_shapes(tmp_path):
    for name, size in {"wide": (400, 100), "tall": (64, 100), "large": (1024, 1030)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    found = check([str(tmp_path)])
    assert {name for name, count in found["short_sides"].items() if count} == {"64 to 127", "1024 and more"}
    assert found["aspects"] == {
        "under 1:2": 0, "1:2 to 3:4": 1, "3:4 to 4:3": 1, "4:3 to 2:1": 0, "2:1 and more": 1
    }  # fmt: skip


def test_a_flipped_byte_is_found_wherever_it_is(source, tmp_path):
    pack([source], tmp_path / "s", shard_rows=12)
    shard = tmp_path / "s" / "shard-00001.tar"
    whole = shard.read_bytes()
    for place in (3, 700, len(whole) // 2, len(whole) - 1):  # a name, a picture, anything, padding
        flip(shard, place)
        found = check([str(tmp_path / "s")])
        assert found["num_checksums"] == 3
        assert any(fault["key"] == str(shard) and "manifest" in fault["reason"] for fault in found["broken"]), (
            place
        )
        shard.write_bytes(whole)
    assert not check([str(tmp_path / "s")])["broken"]
    assert check([f"{tmp_path}/s/shard-0000{{0,1}}.tar"])["num_checksums"] == 2
    shard.unlink()
    (fault,) = check([str(tmp_path / "s")])["broken"]
    assert fault["key"] == str(shard) and "is missing" in fault["reason"]


def test_what_is_broken_is_listed_with_its_key(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encoded(0, i)[: 400 if i == 3 else None])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "bad.tar").write_bytes(b"x" * 1000)
    found = check([str(tmp_path), str(tmp_path / "more"), str(tmp_path / "nowhere")])
    assert found["num_samples"] == 4
    assert [fault["key"] for fault in found["broken"]] == [
        "3.png", str(tmp_path / "more"), str(tmp_path / "nowhere")
    ]  # fmt: skip


def test_a_checksum_of_the_folder_above(source, tmp_path):
    """As `examples/registry_data` lays them out."""
    pack([source], tmp_path / "set" / "train")
    manifest = json.loads((tmp_path / "set" / "train" / "manifest.json").read_text())
    (tmp_path / "set" / "train" / "manifest.json").unlink()
    sums = {f"train/{name}": value for name, value in manifest["sha256"].items()} | {"val/x.tar": "0"}
    (tmp_path / "set" / "manifest.json").write_text(json.dumps({"sha256": sums}))
    found = check([str(tmp_path / "set" / "train")])
    assert found["num_checksums"] == 1 and not found["broken"]


def test_facts_of_every_type_are_packed_as_text(tmp_path):
    """Dates, decimals, bytes and lists; what is missing stays missing, and every `.json` is strict JSON."""
    columns = {
        "image": [{"bytes": encoded(0, i), "path": None} for i in range(2)],
        "label": pa.array([Decimal(3), None], pa.decimal128(5, 2)),
        "url": pa.array([datetime.datetime(2020, 1, 2), None]),
        "author": [b"me", None],
        "licence": [["CC0", "MIT"], None],
        "source": pa.array([float("nan"), 7.5]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    made = pack([str(tmp_path / "a.parquet")], tmp_path / "s")
    assert made["licences_of_samples"] == {'["CC0", "MIT"]': 1, "not stated": 1}
    facts = {"label": 3, "url": "2020-01-02T00:00:00", "author": "me", "licence": '["CC0", "MIT"]'}
    with tarfile.open(tmp_path / "s" / "shard-00000.tar") as tar:
        found = [
            json.loads(tar.extractfile(f"0000000{i}.json").read(), parse_constant=pytest.fail) for i in range(2)
        ]
    assert [without_key(record) for record in found] == [facts, {"source": "7.5"}]
    with pytest.raises(InputError, match="no picture can be read"):
        (tmp_path / "e.csv").write_text("image\n")
        pack([str(tmp_path / "e.csv")], tmp_path / "t")
