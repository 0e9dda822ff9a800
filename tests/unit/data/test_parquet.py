import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlip.data.parquet import ParquetSamples
from qlip.data.samples import BadSample
from qlip.errors import InputError


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_rows_of_several_files_in_order(tmp_path):
    for i, count in enumerate((3, 1, 4)):
        images = [{"bytes": f"{i}.{k}".encode(), "path": None} for k in range(count)]
        write(tmp_path / f"part-{i}.parquet", image=images, label=pa.array(range(count), pa.int16()))
    samples = ParquetSamples([tmp_path])
    assert len(samples) == 8
    assert [s["image"] for s in samples] == [
        f"{i}.{k}".encode() for i, n in enumerate((3, 1, 4)) for k in range(n)
    ]
    assert samples[3] == {"image": b"1.0", "label": 0, "key": "part-1.parquet:0"}
    assert [s["key"] for s in samples[2:5]] == ["part-0.parquet:2", "part-1.parquet:0", "part-2.parquet:0"]
    with pytest.raises(IndexError):
        samples[8]


def test_datasets_library_convention_without_labels(tmp_path):
    images = [{"bytes": b"x", "path": "a.png"}]
    samples = ParquetSamples([write(tmp_path / "a.parquet", image=images, caption=["a cat"])])
    assert samples[0]["caption"] == "a cat" and "label" not in samples[0]


def test_captions_alone(tmp_path):
    images = [{"bytes": b"x", "path": None}] * 2
    write(tmp_path / "a.parquet", image=images, caption=["a cat", None])
    write(tmp_path / "b.parquet", image=images, label=[0, 1])
    write(tmp_path / "c.parquet", image=images, caption=["a dog", "a cow"])
    assert list(ParquetSamples([tmp_path]).captions()) == ["a cat", "a dog", "a cow"]


def test_pictures_beside_the_file(tmp_path):
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/sub/a.png").write_bytes(b"picture")
    images = [{"bytes": None, "path": p} for p in ("sub/a.png", "sub/nowhere.png", None)] + [None]
    samples = ParquetSamples([write(tmp_path / "data/a.parquet", image=images, label=[0] * 4)])
    assert samples[0]["image"] == b"picture"
    with pytest.raises(
        InputError, match=r"a\.parquet:1: its picture '.*sub/nowhere\.png' cannot be read \(No such"
    ):
        samples[1]
    for row in (2, 3):
        with pytest.raises(InputError, match=rf"a\.parquet:{row}: `image` has neither"):
            samples[row]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"bytes": list(b"png")}, "its `bytes` are list"),
        ({"bytes": "aGVsbG8="}, "its `bytes` are str"),
        ({"bytes": None, "path": 7}, "its `path` is int"),
        ({"bytes": None, "path": "/etc/hostname"}, "lies outside of .*--allow-outside"),
        ({"bytes": None, "path": "../secret.png"}, "lies outside of"),
        ({"bytes": None, "path": "link.png"}, "lies outside of"),
        ({"bytes": None, "path": "a\0.png"}, "lies outside of|cannot be read"),
        ({"bytes": None, "path": "pipe.png"}, "no regular file"),
        ({"bytes": None, "path": "data"}, "is a directory"),
    ],
)
def test_an_image_of_another_kind_is_a_bad_sample(tmp_path, image, reason):
    (tmp_path / "secret.png").write_bytes(b"private")
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set/link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "set/pipe.png")
    samples = ParquetSamples([write(tmp_path / "set/a.parquet", image=[image])])
    with pytest.raises(BadSample, match=rf"a\.parquet:0: .*({reason})"):
        samples[0]


def test_paths_as_bytes_and_paths_outside_where_they_are_allowed(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "ü.png").write_bytes(b"picture")
    monkeypatch.setenv("QLIP_ALLOW_OUTSIDE", "1")
    for path in ("../ü.png".encode(), str(tmp_path / "ü.png")):
        images = [{"bytes": None, "path": path}]
        assert ParquetSamples([write(tmp_path / "set/a.parquet", image=images)])[0]["image"] == b"picture"


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.parquet"):
        ParquetSamples([tmp_path / "nowhere.parquet"])
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"bad\.parquet: not a readable"):
        ParquetSamples([tmp_path / "bad.parquet"])
    write(tmp_path / "cut.parquet", image=[{"bytes": bytes(9999), "path": None}], label=[1])
    data = bytearray((tmp_path / "cut.parquet").read_bytes())
    data[4:40] = b"\xff" * 36
    (tmp_path / "cut.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"cut\.parquet:0: .*cut\.parquet: not a readable"):
        ParquetSamples([tmp_path / "cut.parquet"])[0]
    with pytest.raises(InputError, match=r"no column `image`.*words"):
        ParquetSamples([write(tmp_path / "c.parquet", words=["a"])])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no Parquet"):
        ParquetSamples([tmp_path / "empty"])
