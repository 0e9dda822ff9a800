import io
import json
import os
import tarfile

import pytest
from tests.conftest import encoded

from qlip.data.samples import BadSample
from qlip.data.shards import Shard, ShardSamples
from qlip.errors import InputError

PICTURE = encoded(0, 0)


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return path


def samples_of(names, caption="a cat"):
    return {f"{name}.{suffix}": c for name in names for suffix, c in (("png", PICTURE), ("txt", caption.encode()))}


def test_members_of_one_name_are_a_sample(tmp_path):
    members = {
        "readme.md": b"hello",
        "deep/a.JPG": PICTURE, "deep/a.txt": b"one\n\ntwo", "deep/a.seg.png": b"another picture",
        "deep/a.b.cls": b"9",
        "b.png": PICTURE, "b.cls": b"3\n", "b.json": b'{"license": "MIT"}',
        "c.webp": PICTURE, "c.json": b'{"caption": "from json", "width": 3}', "c.txt": b"from txt",
        "other/a.png": PICTURE,
    }  # fmt: skip
    shard = Shard(write(tmp_path / "s.tar", members))
    found = [{k: v for k, v in sample.items() if k != "image"} for sample in shard]
    assert found == [
        {"key": "s.tar/deep/a", "captions": ["one", "two"]},
        {"key": "s.tar/b", "label": 3, "license": "MIT"},
        {"key": "s.tar/c", "caption": "from json"},
        {"key": "s.tar/other/a"},
    ]
    assert all(sample["image"] == PICTURE for sample in shard)
    assert list(shard.captions()) == ["one", "two", "from json"]


def test_the_index_is_kept_beside_the_shard_and_made_anew_when_that_has_changed(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", samples_of("abc"))
    assert len(Shard(path)) == 3 and (tmp_path / "s.tar.index").exists()
    with monkeypatch.context() as patch:
        patch.setattr("qlip.data.shards._scan", pytest.fail)
        assert Shard(path)[2]["key"] == "s.tar/c"
    stat = path.stat()
    write(path, samples_of("abd"))  # of the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path.stat().st_size == stat.st_size and Shard(path)[2]["key"] == "s.tar/d"
    (tmp_path / "s.tar.index").write_bytes(b"no index")
    assert Shard(path)[2]["key"] == "s.tar/d"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "s.tar.index"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", samples_of("abc"))

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pyarrow.ipc.new_file", refuse)
    assert len(Shard(path)) == 3 and not (tmp_path / "s.tar.index").exists()


@pytest.mark.parametrize(
    ("cut", "whole"), [(0, "a"), (300, "a"), (700, "ab")], ids=["between members", "in a header", "in contents"]
)
def test_a_shard_that_ends_early_has_what_is_surely_whole(tmp_path, cut, whole):
    path = write(tmp_path / "s.tar", samples_of("abcd"))
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    path.write_bytes(path.read_bytes()[: offsets[4] + cut])
    for _ in range(2):  # scanned, and by its index
        shard = Shard(path)
        (fault,) = shard.unreadable
        assert fault.is_file and fault.key == str(path)
        assert [sample["key"] for sample in shard] == [f"s.tar/{name}" for name in whole]


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = write(tmp_path / "s.tar", samples_of("abcd"))
    with tarfile.open(path) as tar:
        offset = [member.offset for member in tar][4]
    contents = bytearray(path.read_bytes())
    contents[offset + 3] ^= 1
    path.write_bytes(contents)
    shard = Shard(path)
    assert len(shard) == 1 and "bad checksum" in shard.unreadable[0].reason


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"no picture"}, "no picture among its members"),
        ({"a.png": PICTURE, "a.json": b"{"}, "its words are damaged"),
        ({"a.png": PICTURE, "a.json": b"[]"}, "its words are damaged"),
        ({"a.png": PICTURE, "a.txt": b"\xff"}, "its words are damaged"),
        ({"a.png": PICTURE, "a.cls": b"dog"}, "its label is 'dog', not the number of a class"),
    ],
)
def test_a_bad_sample_is_named_and_the_others_are_good(tmp_path, members, message):
    shard = Shard(write(tmp_path / "s.tar", members | samples_of("b")))
    with pytest.raises(BadSample, match=f"^s.tar/a: {message}"):
        shard[0]
    assert shard[1]["caption"] == "a cat" and list(shard.captions())[-1] == "a cat"


def test_files_that_are_no_shards(tmp_path):
    good, bad = write(tmp_path / "a.tar", samples_of("a")), tmp_path / "b.tar"
    bad.write_bytes(b"x" * 2000)
    samples = ShardSamples([good, bad, tmp_path / "c.tar", write(tmp_path / "d.tar", {"readme": b""})])
    assert len(samples) == 1 and samples.num_files == 4
    assert [fault.key for fault in samples.unreadable] == [str(bad), *(f"{tmp_path}/{n}.tar" for n in "cd")]
    with pytest.raises(InputError, match=r"b\.tar: not a readable shard"):
        ShardSamples([bad])


def test_names_of_classes_come_from_the_manifest(tmp_path):
    path = write(tmp_path / "a.tar", samples_of("a"))
    (tmp_path / "manifest.json").write_text(json.dumps({"class_names": ["cat", "dog"]}))
    assert ShardSamples([path]).class_names == ("cat", "dog")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: not a usable manifest"):
        ShardSamples([path])


def test_members_that_other_programs_leave_do_not_count(tmp_path):
    members = {"a.png": PICTURE, "._a.png": b"\0\5\26\7", "a.txt": b"\xef\xbb\xbfa cat", "__MACOSX/._a.png": b"\0"}
    (sample,) = Shard(write(tmp_path / "s.tar", members))
    assert sample == {"image": PICTURE, "key": "s.tar/a", "caption": "a cat"}


def test_images_whose_names_have_dots_are_bad_samples_and_not_lost(tmp_path):
    shard = Shard(write(tmp_path / "s.tar", {"a.png": PICTURE, "a.mask.png": PICTURE, "b.v2.png": PICTURE}))
    assert len(shard) == 2 and shard[0]["key"] == "s.tar/a"
    with pytest.raises(BadSample, match=r"^s\.tar/b: no picture among its members .* passed over"):
        shard[1]


def test_names_of_members_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, contents in (("café.png", PICTURE), ("café.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    (sample,) = Shard(tmp_path / "s.tar")
    assert sample["key"] == "s.tar/caf\\udce9" and sample["caption"] == "a cat"
