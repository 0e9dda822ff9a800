"""Every kind of source gives the same samples, to every kind of process, in the same order."""

import csv
import json
import multiprocessing
import os
import pickle
import tarfile
import threading
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.conftest import encoded

from qlip.data.captions import Captioner
from qlip.data.loader import TrainingSet, batches
from qlip.data.samples import BadSample, Fault, readable
from qlip.data.shards import add_sample
from qlip.data.sources import expand_braces, open_samples
from qlip.data.stream import Stream
from qlip.errors import InputError

COUNT = 24
PICTURES = [encoded(i % 4, i) for i in range(COUNT)]
CAPTIONS = [
    [f"square {i}", f"a square, the {i}th"] if i % 3 else [f"a “plain”, square\t{i}"] for i in range(COUNT)
]
INDEXED = ("parquet", "folder", "csv", "tsv", "jsonl", "shards", "datasets")


def write_pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(PICTURES):
        (folder / f"{i:03d}.png").write_bytes(picture)


def write_shards(folder, per_shard=10):
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, COUNT, per_shard):
        with tarfile.open(folder / f"{start:03d}.tar", "w") as tar:
            for i in range(start, min(start + per_shard, COUNT)):
                add_sample(tar, i, PICTURES[i], "png", {"captions": CAPTIONS[i]})
    return folder


def write(kind, folder):
    """The pictures and captions as such a source; gives its name."""
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        images = [{"bytes": picture, "path": None} for picture in PICTURES]
        table = pa.table({"image": images, "captions": CAPTIONS})
        for part, start in enumerate(range(0, COUNT, 10)):
            pq.write_table(table.slice(start, 10), folder / f"{part}.parquet", row_group_size=4)
        return folder
    if kind == "datasets":
        import datasets

        images = [{"bytes": picture, "path": None} for picture in PICTURES]
        table = datasets.Dataset.from_dict({"img": images, "captions": CAPTIONS})
        table.cast_column("img", datasets.Image()).to_parquet(folder / "a.parquet")
        return f"datasets:{folder}:train"
    if kind == "shards":
        return write_shards(folder)
    write_pictures(folder / "pictures")
    paths = [f"pictures/{i:03d}.png" for i in range(COUNT)]
    if kind == "folder":
        for i, said in enumerate(CAPTIONS):
            (folder / f"pictures/{i:03d}.txt").write_text("\n".join(said) + "\n")
        return folder
    file = folder / f"list.{kind}"
    with file.open("w", newline="") as out:
        if kind == "jsonl":
            out.writelines(
                json.dumps({"image": p, "captions": c}) + "\n" for p, c in zip(paths, CAPTIONS, strict=True)
            )
        else:
            writer = csv.writer(out, delimiter="\t" if kind == "tsv" else ",")
            writer.writerow(["file_name", "captions"])
            writer.writerows([p, "\n".join(c)] for p, c in zip(paths, CAPTIONS, strict=True))
    return file


@pytest.fixture
def source(request, tmp_path, monkeypatch):
    if request.param == "datasets":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        pytest.importorskip("datasets")
    return write(request.param, tmp_path / request.param)


def said(sample):
    return sample.get("captions") or [sample["caption"]]


def transform(image, rng):
    return torch.tensor([float(sum(image)), rng.random()])


def tokenize(texts):
    mask = torch.tensor([[1] * len(t) + [0] * (40 - len(t)) for t in texts])
    return mask, mask


def training_set(samples):
    return TrainingSet(samples, transform, Captioner(), seed=5)


@pytest.mark.parametrize("source", INDEXED, indirect=True)
def test_every_source_gives_pictures_keys_and_words(source):
    samples = open_samples([source])
    assert len(samples) == COUNT
    assert [sample["image"] for sample in samples] == PICTURES
    assert [said(sample) for sample in samples] == CAPTIONS
    assert len({sample["key"] for sample in samples}) == COUNT
    assert list(samples.captions()) == [text for texts in CAPTIONS for text in texts]
    assert [s["image"] for s in samples[20:99]] == PICTURES[20:]
    with pytest.raises(IndexError):
        samples[COUNT]


@pytest.mark.parametrize("source", INDEXED, indirect=True)
def test_every_source_goes_on_where_it_stopped_with_any_workers(source):
    def made(start, stop, num_workers=0):
        dataset = training_set(open_samples([source]))  # opened anew, as a resumed run does
        return list(islice(batches(dataset, tokenize, 5, start, num_workers), stop - start))

    whole = made(0, 9)
    assert len({key for batch in whole[:4] for key in batch["keys"]}) == 20
    for batch, again in zip(
        whole, made(0, 3, num_workers=2) + made(3, 7) + made(7, 9, num_workers=1), strict=True
    ):
        assert batch["keys"] == again["keys"]
        assert all(torch.equal(batch[name], again[name]) for name in ("pixel_values", "input_ids", "group"))


def test_sources_of_several_kinds_in_workers_of_a_fresh_interpreter(tmp_path):
    kinds = [kind for kind in INDEXED if kind != "datasets"]
    samples = open_samples([write(kind, tmp_path / kind) for kind in kinds])
    assert [sample["image"] for sample in samples] == PICTURES * len(kinds)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = next(batches(training_set(samples), tokenize, 60, num_workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    here = next(batches(training_set(samples), tokenize, 60))
    assert spawned["keys"] == here["keys"] and torch.equal(spawned["pixel_values"], here["pixel_values"])


def test_rows_of_parquet_are_decoded_when_they_are_asked_for_and_forgotten(tmp_path, monkeypatch):
    from qlip.data import parquet

    monkeypatch.setattr(parquet, "_held", parquet._Held(1))  # room for nothing but the last
    samples = open_samples([write("parquet", tmp_path / "p")])
    order = np.random.default_rng(0).permutation(COUNT)
    assert [samples[i]["image"] for i in order] == [PICTURES[i] for i in order]
    assert len(parquet._held._tables) == 1


def test_classes_by_folder(tmp_path):
    for i, name in enumerate(("tabby_cat", "dog", "dog")):
        place = tmp_path / "p" / name / "deep"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.PNG").write_bytes(PICTURES[i])
    samples = open_samples([tmp_path / "p"])
    assert samples.class_names == ("dog", "tabby_cat")
    assert [(s["key"], s["label"]) for s in samples] == [
        ("dog/deep/1.PNG", 0), ("dog/deep/2.PNG", 0), ("tabby_cat/deep/0.PNG", 1)
    ]  # fmt: skip
    (tmp_path / "p" / "dog" / "deep" / "1.txt").write_text("a dog\n\n its back\n")
    samples = open_samples([tmp_path / "p"])
    assert samples.class_names == () and not list(samples)[1].keys() & {"label", "caption", "captions"}
    assert samples[0]["captions"] == ["a dog", "its back"]
    (tmp_path / "p" / "dog" / "deep" / "1.txt").unlink()
    (tmp_path / "p" / "loose.png").write_bytes(PICTURES[0])
    assert "label" not in open_samples([tmp_path / "p"])[0]


def test_two_folders_that_number_other_classes(tmp_path):
    for name in ("a/cat", "a/dog", "b/cow", "b/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(PICTURES[0])
    with pytest.raises(InputError, match=r"number their classes differently \(cat, dog; cow, dog\)"):
        open_samples([tmp_path / "a", tmp_path / "b"])


def test_names_of_columns_that_others_use(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "m.jsonl").write_text(
        '{"file_name": "000.png", "text": "a cat"}\n\n'
        '{"filepath": "001.png", "caption": ["a", " ", "b"], "licence": "CC0"}\n'
        '{"image": "002.png", "label": 3, "text": null}\n'
    )
    words = [
        {k: v for k, v in s.items() if k not in ("image", "key")} for s in open_samples([tmp_path / "m.jsonl"])
    ]
    assert words == [{"caption": "a cat"}, {"captions": ["a", "b"], "licence": "CC0"}, {"label": 3}]
    (tmp_path / "m.csv").write_text("filepath,label,caption\n000.png,3,\n001.png,,007\n")
    words = [{k: v for k, v in s.items() if k not in ("image", "key")} for s in open_samples([tmp_path / "m.csv"])]
    assert words == [{"label": 3}, {"caption": "007"}]


@pytest.mark.parametrize("line", ['{"image": "nowhere.png"}', "{", "[]", '{"caption": "a cat"}', '{"image": 7}'])
def test_a_bad_row_is_a_bad_sample_and_no_more(tmp_path, line):
    write_pictures(tmp_path)
    (tmp_path / "m.jsonl").write_text(f'{line}\n{{"image": "001.png", "caption": "good"}}\n')
    samples = open_samples([tmp_path / "m.jsonl"])
    with pytest.raises(BadSample, match=r"^m\.jsonl:0: "):
        samples[0]
    assert samples[1]["image"] == PICTURES[1] and list(samples.captions())[-1] in ("good", "a cat")


def test_captions_that_are_no_text_are_a_bad_sample(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "003.txt").write_bytes(b"\xff\xfe")
    samples = open_samples([tmp_path])
    with pytest.raises(BadSample, match=r"^003\.png: its captions cannot be read"):
        samples[3]


def test_one_file_of_many_that_cannot_be_read_does_not_end_it(tmp_path):
    folder = write("parquet", tmp_path / "p")
    (folder / "9.parquet").write_bytes(b"no Parquet")
    samples = open_samples([folder])
    assert len(samples) == COUNT and samples.num_files == 4
    (fault,) = samples.unreadable
    assert fault.is_file and fault.key == str(folder / "9.parquet") and "not a readable Parquet" in fault.reason
    with pytest.raises(InputError, match=r"9\.parquet: not a readable Parquet"):
        open_samples([folder, folder / "9.parquet"])  # named, it must be good


@pytest.mark.parametrize(
    ("source", "message"),
    {
        "nowhere": "nowhere: no such file or folder$",
        "my/nowhere": "no such file or folder; a set of the hub is datasets:my/nowhere",
        "empty": "empty: no pictures in this folder, no Parquet files and no shards",
        "a.doc": r"a\.doc: not a source of data: name a folder of pictures",
        "a.csv": r"a\.csv: no column of paths; its columns are \['words'\]",
        "a.jsonl": r"a\.jsonl: has no lines",
        "a.tar": r"a\.tar: not a readable shard",
        "both": "both: holds Parquet files and shards",
        "*.tif": "nothing there",
        "gopher://a/b.tar": "no way to read gopher://",
        "https://a/*.tar": "a web server does not say what it has",
    }.items(),
)
def test_what_is_no_source_is_named(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "both"):
        os.mkdir(folder)
    for file, text in {"a.doc": "", "a.csv": "words\nx\n", "a.jsonl": "", "a.tar": "x" * 999}.items():
        (tmp_path / file).write_text(text)
    for file in ("both/a.tar", "both/a.parquet"):
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=message) as raised:
        open_samples([source])
    assert len(str(raised.value).splitlines()) == 1


def test_nothing_named():
    with pytest.raises(InputError, match="no data: name a folder of pictures"):
        open_samples([])


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[datasets\]'"):
        open_samples(["datasets:mnist"])
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[remote\]'"):
        open_samples(["s3://bucket/{0..3}.tar"])


@pytest.mark.parametrize(
    ("pattern", "names"),
    {
        "a.tar": ["a.tar"],
        "a-{08..11}.tar": ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"],
        "{x,y}/{0..1}": ["x/0", "x/1", "y/0", "y/1"],
        "a{b}c": ["a{b}c"],
    }.items(),
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


def test_remote_and_local_sources_together_are_a_stream(tmp_path):
    shards = write_shards(tmp_path / "s")
    stream = open_samples([f"file://{shards}/{{000,010,020}}.tar", write("jsonl", tmp_path / "j")])
    assert isinstance(stream, Stream) and stream.num_files == 4
    assert [sample["image"] for sample in stream] == PICTURES * 2
    assert open_samples([f"file://{shards}/*.tar"]).shards == stream.shards[:3]


def test_an_image_file_is_a_source_and_a_folder_has_them_by_content(tmp_path):
    content = {
        suffix: f"{suffix}".encode() for suffix in ("jfif", "JPE", "pgm", "apng", "j2k", "mpo", "avifs", "heic")
    }
    for suffix, data in content.items():
        (tmp_path / f"a.{suffix}").write_bytes(data)
    (tmp_path / "photo").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "notes.doc").write_bytes(b"words")
    samples = open_samples([tmp_path])
    assert {sample["key"] for sample in samples} == {f"a.{suffix}" for suffix in content} | {"photo"}
    assert open_samples([tmp_path / "a.jfif", tmp_path / "photo"])[0]["image"] == b"jfif"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.jfif", "x.jfif")
    assert open_samples([tmp_path / "a.tar"])[0]["image"] == b"jfif"


def test_a_pipe_in_a_folder_is_named_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\n{"image": "/dev/zero"}\n')
    for source, index in ((tmp_path, 0), (tmp_path / "list.jsonl", 0), (tmp_path / "list.jsonl", 1)):
        with pytest.raises(BadSample, match="no regular file"):
            open_samples([source])[index]


BAD = {  # a bad row of each kind, beside good ones
    "csv": (
        b"image,caption,label\n000.png,a cat,3.0\n001.png,caf\xe9,1\n002.png,a dog,cat\n"
        b",a cow,1\n003.png,a,b,c\n004.png,a hen,\n", 5,
    ),
    "jsonl": (
        b'{"image": "000.png", "caption": "a cat", "label": "3"}\n{"image": "001.png", "caption": "caf\xe9"}\n'
        b'{"image": "001.png", "caption": "\\ud800"}\n{"image": 7}\n{"image": "002.png", "caption": {"en": "a"}}\n'
        b'{"image": "a\\u0000b"}\n{"image": "002.png", "author": "\\udfff"}\n' + b"[" * 100_000 + b"\n"
        b'{"image": "004.png", "caption": "a hen", "label": NaN}\n', 9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_value_costs_its_row(tmp_path, kind):
    write_pictures(tmp_path)
    contents, count = BAD[kind]
    (tmp_path / f"m.{kind}").write_bytes(contents)
    samples = open_samples([tmp_path / f"m.{kind}"])
    found = [item for item in readable(samples, range(len(samples))) if not isinstance(item, Fault)]
    assert [(s["caption"], s.get("label")) for s in found] == [("a cat", 3), ("a hen", None)]
    assert len(samples) + len(samples.unreadable) == count + (kind == "csv")
    assert {"a cat", "a hen"} <= set(samples.captions()) <= {"a cat", "a hen", "a cow"}


def test_a_bad_value_costs_its_row_of_parquet(tmp_path):
    """Strings that are not UTF-8, dates that Python does not have, and images that are no bytes."""
    invalid = pa.Array.from_buffers(pa.binary(), 3, pa.array([b"a cat", b"\xff", b"a dog"]).buffers()).view(
        pa.string()
    )
    image = [{"bytes": PICTURES[0], "path": None}] * 3
    when = pa.array([0, 0, 2**31 - 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"image": image, "caption": invalid, "url": when}), tmp_path / "a.parquet")
    samples = open_samples([tmp_path / "a.parquet"])
    assert samples[0]["caption"] == "a cat" and samples[0]["url"] == "1970-01-01"
    for row, column in ((1, "caption"), (2, "url")):
        with pytest.raises(BadSample, match=rf"a\.parquet:{row}: its {column} cannot be read"):
            samples[row]
    assert list(samples.captions()) == ["a cat", "a dog"]
    for name, images in {
        "list": [{"bytes": [1, 2]}],
        "text": [{"bytes": "aGk="}],
        "path": [{"bytes": None, "path": 7}],
    }.items():
        pq.write_table(pa.table({"image": images}), tmp_path / f"{name}.parquet")
        with pytest.raises(BadSample, match=rf"{name}\.parquet:0: its `(bytes|path)`"):
            open_samples([tmp_path / f"{name}.parquet"])[0]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
def test_a_column_that_stands_twice_is_named(tmp_path, name):
    if name == "a.parquet":
        columns = [pa.array([{"bytes": b"x"}]), pa.array(["a"]), pa.array(["b"])]
        pq.write_table(pa.Table.from_arrays(columns, names=["image", "caption", "caption"]), tmp_path / name)
    else:
        (tmp_path / name).write_text("image,caption,caption\n".replace(",", "\t" if name == "a.tsv" else ","))
    with pytest.raises(InputError, match=rf"{name}: has the column 'caption' twice"):
        open_samples([tmp_path / name])


def test_listings_of_other_encodings_are_named(tmp_path):
    for name, text in {"a.csv": "image,caption\n000.png,a\n", "a.jsonl": '{"image": "000.png"}\n'}.items():
        for encoding in ("utf-16", "utf-16-le"):
            (tmp_path / name).write_text(text, encoding=encoding)
            with pytest.raises(InputError, match=rf"{name}: is UTF-16"):
                open_samples([tmp_path / name])
    (tmp_path / "b.csv").write_text("image,caption\n000.png,café\n", encoding="latin-1")
    with pytest.raises(
        BadSample, match=r"b\.csv:0: its caption is not UTF-8 \(byte 0xe9 at 3\): save it as UTF-8"
    ):
        write_pictures(tmp_path)
        open_samples([tmp_path / "b.csv"])[0]


def test_rows_of_what_other_programs_leave_do_not_count(tmp_path):
    write_pictures(tmp_path)
    paths = ["000.png", "._000.png", "__MACOSX/._1.png", "./001.png", ".DS_Store", "a/Thumbs.db"]
    (tmp_path / "m.csv").write_text("image\n" + "\n".join(paths))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"image": path}) + "\n" for path in paths))
    for name in ("m.csv", "m.jsonl"):
        assert [s["key"] for s in open_samples([tmp_path / name])] == [f"{name}:0", f"{name}:1"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
@pytest.mark.parametrize(
    "text",
    [
        "image,caption\n000.png,a cat\n",
        "image\tcaption\n000.png\ta cat\n",
        '\ufeff{"image": "000.png", "caption": "a cat"}\n',
    ],
)
def test_a_listing_through_a_pipe(tmp_path, monkeypatch, text):
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text, encoding="utf-8"))
    writer.start()
    samples = pickle.loads(pickle.dumps(open_samples(["pipe"])))
    writer.join()
    assert [(s["image"], s["caption"]) for s in samples] == [(PICTURES[0], "a cat")]
    assert list(samples.captions()) == ["a cat"]


def test_data_without_a_row(tmp_path):
    """It is a set of no samples, and no stream."""
    pq.write_table(pa.table({"image": pa.array([], pa.struct([("bytes", pa.binary())]))}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("image,caption\n")
    for name in ("a.parquet", "a.csv"):
        samples = open_samples([tmp_path / name])
        assert not isinstance(samples, Stream) and len(samples) == 0 and list(samples.captions()) == []
        with pytest.raises(InputError, match="0 samples do not fill a batch"):
            next(batches(training_set(samples), tokenize, 2))
