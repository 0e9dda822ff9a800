import io
import json
import os
import tarfile

import pyarrow as pa
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


def header(name="a.png", size=0, kind=tarfile.REGTYPE, pax=None):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.pax_headers = size, kind, pax or {}
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


LONG_NAME = header("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME) + b"x" * 512


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (header(size=64 << 30), "'a.png' is said to have 68,719,476,736 bytes"),
        (header(size=1 << 62), "'a.png' is said to have"),
        (header(size=-1024), "'a.png' is said to have -1,024 bytes"),
        (header(size=4096), "goes on behind the end|unexpected end"),
        (header("././@LongLink", 1 << 62, tarfile.GNUTYPE_LONGNAME), "is said to have"),
        (header("pax", 1 << 40, tarfile.XHDTYPE), "is said to have"),
        (LONG_NAME * 5000 + header(), "damaged at byte 0: (maximum recursion|missing or bad subsequent)"),
        (header(pax={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 62)}), "is sparse, or larger"),
        (header(pax={"GNU.sparse.map": "x"}), "damaged|is sparse"),
        (header(size=512, pax={"size": str(1 << 62)}), "is sparse, or larger than an image"),
    ],
)
def test_sizes_that_a_file_does_not_have_cost_nothing(tmp_path, contents, message):
    (tmp_path / "s.tar").write_bytes(contents + bytes(1024))
    with pytest.raises(InputError, match=rf"s\.tar: not a readable shard .*({message})"):
        Shard(tmp_path / "s.tar")
    good = write(tmp_path / "good.tar", samples_of("bc")).read_bytes().rstrip(b"\0")
    (tmp_path / "s.tar").write_bytes(good + bytes(-len(good) % 512) + contents + bytes(1024))
    shard = Shard(tmp_path / "s.tar")
    assert 1 <= len(shard) <= 2 and len(shard.unreadable) == 1


def test_a_shard_of_the_same_size_and_time_is_told_from_the_one_before(tmp_path):
    path = write(tmp_path / "s.tar", samples_of("ab"))
    Shard(path)
    stat = path.stat()
    write(path, samples_of("cb"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shard = Shard(path)
    assert shard[1]["key"] == "s.tar/b"
    with pytest.raises(
        BadSample, match=r"s\.tar/a: .*not the one that its index was made of: delete s\.tar\.index"
    ):
        shard[0]


@pytest.mark.parametrize(
    "name", ["é.png", "x" * 95 + ".png", "x" * 300 + ".png", "a" * 80 + "/" + "b" * 80 + ".png"]
)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_in_headers_of_their_own(tmp_path, name, kind):
    with tarfile.open(tmp_path / "s.tar", "w", format=kind) as tar:
        member = tarfile.TarInfo(name)
        member.size = len(PICTURE)
        tar.addfile(member, io.BytesIO(PICTURE))
    assert Shard(tmp_path / "s.tar")[0] == {"image": PICTURE, "key": f"s.tar/{name.removesuffix('.png')}"}


def test_an_index_that_came_with_the_data_is_not_believed(tmp_path):
    path = write(tmp_path / "s.tar", samples_of("a"))
    Shard(path)
    good = pa.ipc.open_file(tmp_path / "s.tar.index").read_all()
    for changes in (
        {"image_offset": 1 << 62},
        {"image_offset": -512},
        {"image_offset": 0},
        {"image_size": 1 << 40},
        {"image_size": -1},
        {"image_size": None},
        {"key": None},
    ):
        table = pa.Table.from_pylist([good.to_pylist()[0] | changes], good.schema)
        with pa.ipc.new_file(tmp_path / "s.tar.index", table.schema) as writer:
            writer.write_table(table)
        assert Shard(path)[0] == {"image": PICTURE, "key": "s.tar/a", "caption": "a cat"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_pipes_are_no_shards_and_no_indices(tmp_path):
    os.mkfifo(tmp_path / "p.tar")
    with pytest.raises(InputError, match=r"p\.tar: not a regular file"):
        ShardSamples([tmp_path / "p.tar"])
    os.mkfifo(tmp_path / "s.tar.index")
    assert len(Shard(write(tmp_path / "s.tar", samples_of("a")))) == 1
