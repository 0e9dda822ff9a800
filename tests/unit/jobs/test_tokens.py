"""Pictures to token files and back: which file has which rows, what goes on, what is refused."""

import io
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.conftest import encoded
from tests.unit.data.test_shards import write
from tests.unit.data.test_stream import Server

import qlip
from qlip.data import stream
from qlip.data.token_file import TokenFiles, TokenFormat, write_token_file
from qlip.errors import InputError
from qlip.eval.metrics import to_uint8
from qlip.jobs.tokens import detokenize_files, tokenize
from qlip.jobs.tokens_job import Work
from qlip.jobs.tokens_shards import remaining


def pictures(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:02d}.png").write_bytes(encoded(i % 4, i))
    return str(folder)


def rows(folder):
    """Key → ids, in order."""
    found = TokenFiles.open([folder])
    return {key: tuple(row) for keys, ids in found.batches() for key, row in zip(keys, ids.tolist(), strict=True)}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


def format_of(model):
    return TokenFormat(model.name, model.id_hash(), model.config.num_bits, model.config.grid)


@pytest.mark.skipif(os.name == "nt", reason="file names are UTF-16")
def test_a_name_that_is_not_utf8(job, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.jpg")
    Path(path).write_bytes(file.getvalue())
    done = tokenize(replace(job, sources=(path, path), out=tmp_path / "t.parquet"))
    assert done.files == [tmp_path / "t.parquet"] and done.num_rows == 1 and not done.failures
    assert TokenFiles.open(done.files).keys() == [f"{tmp_path}/bad\\udcff.jpg"]
    model = qlip.load(job.model)
    assert detokenize_files(model, done.files, tmp_path / "out") == [tmp_path / "out/bad\\udcff.png"]


def test_all_of_an_image_or_its_middle(job, tmp_path, caplog):
    path = tmp_path / "wide.png"
    wide = Image.effect_noise((90, 40), 80).convert("RGB")
    wide.save(path)
    model = qlip.load(job.model)
    with caplog.at_level("INFO", "qlip"):
        for how in ("crop", "squash"):
            done = tokenize(replace(job, sources=(str(path),), out=tmp_path / f"{how}.parquet", resize=how))
            ((_, ids),) = rows(done.files[0]).items()
            seen = model.image_processor.preprocess(path, how)
            assert list(ids) == model.tokenize(seen)[0].tolist()
    said = [record.getMessage() for record in caplog.records if "the middle" in record.getMessage()]
    assert said == ["of 1 image the middle is used: --resize squash uses all of them"]
    with pytest.raises(InputError, match="is of another image processor"):
        tokenize(replace(job, sources=(str(path),), out=tmp_path / "crop.parquet", resize="squash"))


@pytest.mark.parametrize(("size", "counts"), ((3, [2, 3, 3, 1]), (5, [4, 5]), (40, [9])))
def test_a_shard_is_of_a_fixed_range_of_the_source(job, tmp_path, size, counts):
    folder = pictures(tmp_path / "in", 10)
    (tmp_path / "in" / "01.png").write_bytes(b"junk")
    done = tokenize(replace(job, sources=(folder,), shard_rows=size))
    assert [pq.read_metadata(file).num_rows for file in done.files] == counts
    assert [file.name for file in done.files] == [f"tokens-{i:05d}.parquet" for i in range(len(counts))]
    good = [f"{i:02d}.png" for i in range(10) if i != 1]
    expected = qlip.load(job.model).tokenize([f"{folder}/{name}" for name in good])
    assert rows(job.out) == {key: tuple(ids) for key, ids in zip(good, expected.tolist(), strict=True)}
    (failure,) = done.failures
    assert failure.startswith("01.png: ") and "cannot be read as an image" in failure
    manifest = json.loads((job.out / "_manifest.json").read_text())
    assert manifest["num_rows"] == 9 and manifest["num_samples"] == 10
    assert [failure["key"] for failure in manifest["failures"]] == ["01.png"]
    assert [shard["num_rows"] for shard in manifest["shards"]] == counts
    assert (
        manifest["format"]["id_hash"] == qlip.load(job.model).id_hash() and manifest["job"]["dtype"] == "float32"
    )


def test_workers_and_ranks_write_the_same_bytes(job, tmp_path):
    job = replace(job, sources=(pictures(tmp_path / "in", 10),), shard_rows=3)
    tokenize(job)
    two = replace(job, out=tmp_path / "two", num_workers=2)
    for rank in (1, 0):
        work = Work.open(two, torch.device("cpu"))
        work.tokenize(remaining(work.units, [])[rank::2])
    assert contents(two.out) == contents(job.out)


def test_what_is_there_is_not_done_again(job, tmp_path, caplog):
    job = replace(job, sources=(pictures(tmp_path / "in", 10),), shard_rows=3)
    before, first = tokenize(job), contents(job.out)
    assert before.num_skipped == 0
    for name in ("tokens-00001.parquet", "_manifest.json"):
        (job.out / name).unlink()
    (job.out / ".tokens-00001.parquet.unfinished").write_bytes(b"half a file")
    times = written(job.out)
    with caplog.at_level(logging.INFO, "qlip"):
        done = tokenize(job)
    assert done.num_skipped == 7 and done.num_rows == 10 and "7 rows are there already" in caplog.text
    assert contents(job.out) == first and times.items() <= written(job.out).items()
    assert {path.name for path in job.out.iterdir()} == {*first, "_manifest.json"}


def test_another_job_is_refused_by_name(job, small_model, tmp_path):
    folder, other = pictures(tmp_path / "in", 4), pictures(tmp_path / "other", 4)
    (tmp_path / "other" / "00.png").write_bytes(encoded(3, 77))
    job = replace(job, sources=(folder,))
    tokenize(job)
    with torch.no_grad():
        small_model.vision_model.quant_embed.c_proj.weight.add_(1)
    small_model.save(tmp_path / "changed")
    changes = {
        "model": {"model": str(tmp_path / "changed")},
        "dtype": {"dtype": "bfloat16"},
        "image size, 32 × 32, and not 16 × 48": {"image_size": (16, 48)},
        "source": {"sources": (other,)},
        "batch size, 2, and not 3": {"batch_size": 3},
        "number of rows in a shard": {"shard_rows": 3},
        "choice of columns": {"keep": ("label",)},
    }
    before = contents(job.out)
    for what, change in changes.items():
        with pytest.raises(InputError, match=f"tokens-00000.parquet is of another {what}") as raised:
            tokenize(replace(job, **change))
        assert "--out" in str(raised.value) and contents(job.out) == before
    tokenize(replace(job, num_workers=1))


def test_files_of_unknown_origin_are_refused(job, small_model, tmp_path):
    ids = np.zeros((1, 16), np.int64)
    write_token_file(job.out / "tokens-00000.parquet", format_of(small_model), ["a"], ids)
    with pytest.raises(InputError, match=r"tokens-00000\.parquet does not say what it was made from"):
        tokenize(replace(job, sources=(pictures(tmp_path / "in", 1),)))


def test_words_are_kept(job, tmp_path):
    image = [{"bytes": encoded(0, i)} for i in range(4)]
    captions = [["a cat", "a tabby"], None, ["caf\u00e9"], ["\u00fc"]]
    table = pa.table({"image": image, "captions": captions, "label": pa.array([3, None, 0, 1], pa.int16())})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "0.png").write_bytes(encoded(1, 1))
    lines = [{"image": "0.png", "label": "cat"}, {"image": "0.png", "caption": "\ud800"}, {"image": "0.png"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = (str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl"))
    done = tokenize(replace(job, sources=sources, keep=("caption", "captions", "label")))
    found = pq.read_table(done.files[0])
    assert found.column_names == ["key", "tokens", "caption", "captions", "label"]
    assert found["key"].to_pylist() == [*(f"a.parquet:{i}" for i in range(4)), "b.jsonl:2"]
    assert found["caption"].to_pylist() == ["a cat", None, "caf\u00e9", "\u00fc", None]
    assert found["captions"].to_pylist() == [*captions, None]
    assert found["label"].to_pylist() == [3, None, 0, 1, None]
    assert done.failures == [
        "b.jsonl:0: its label is 'cat', not the number of a class: number the classes",
        "b.jsonl:1: its caption is '\\ud800', not valid Unicode",
    ]
    assert len(TokenFiles.open(done.files).keys()) == 5


def test_weights_of_16_bits_make_ids_of_the_same_name(job, small_model, tmp_path):
    folder = pictures(tmp_path / "in", 3)
    done = tokenize(replace(job, sources=(folder,), dtype="bfloat16", out=tmp_path / "t.parquet"))
    found = TokenFiles.open(done.files)
    assert found.format == replace(format_of(small_model), model="small")
    expected = qlip.load(job.model, dtype=torch.bfloat16).tokenize([f"{folder}/0{i}.png" for i in range(2)])
    ((_, ids),) = found.batches()
    assert (ids[:2] == expected.numpy()).all()
    assert len(detokenize_files(small_model, done.files, tmp_path / "out")) == 3


def test_pictures_beside_other_sources(job, tmp_path):
    folder, one, gone = pictures(tmp_path / "in", 2), tmp_path / "one.png", str(tmp_path / "gone.jpg")
    one.write_bytes(encoded(0, 9))
    done = tokenize(replace(job, sources=(str(one), gone, folder), out=tmp_path / "t.parquet"))
    assert TokenFiles.open(done.files).keys() == [str(one), "00.png", "01.png"]
    assert len(done.failures) == 1 and done.failures[0].startswith(f"{gone}: ")
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        tokenize(replace(job, sources=(str(tmp_path / "nowhere"),)))
    with pytest.raises(InputError, match="no data"):
        tokenize(job)


def test_nothing_stays_of_nothing(job, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"junk")
    for out in (tmp_path / "t.parquet", tmp_path / "folder"):
        done = tokenize(replace(job, sources=(str(bad),), out=out))
        assert done.num_rows == 0 and not done.files and len(done.failures) == 1 and not out.exists()


def test_what_out_may_be(job, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.parquet").mkdir()
    job = replace(job, sources=(pictures(tmp_path / "in", 1),))
    for name in ("file", "folder.parquet"):
        with pytest.raises(InputError, match=f"{name}: with the suffix .parquet it must be a file"):
            tokenize(replace(job, out=tmp_path / name))


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "FIRST_WAIT_S", 0)
    (tmp_path / "shards").mkdir()
    for i, count in enumerate((7, 4, 1)):
        members = {f"{k}.png": encoded(k % 4, 10 * i + k) for k in range(count)}
        write(tmp_path / "shards" / f"{i}.tar", members)
    found = Server(tmp_path / "shards")
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_remote_shards_make_files_of_their_own(job, server, tmp_path):
    job = replace(job, sources=(f"{server.url}/{{0..2}}.tar",), shard_rows=2)
    done = tokenize(job)
    pieces = {(0, 0): 2, (0, 1): 2, (0, 2): 2, (0, 3): 1, (1, 0): 2, (1, 1): 2, (2, 0): 1}
    names = [f"tokens-{unit:05d}-{piece:03d}.parquet" for unit, piece in pieces]
    assert [file.name for file in done.files] == names and done.num_rows == 12
    assert [pq.read_metadata(file).num_rows for file in done.files] == list(pieces.values())
    local = replace(
        job, sources=tuple(str(tmp_path / "shards" / f"{i}.tar") for i in range(3)), out=tmp_path / "l"
    )
    tokenize(local)
    assert list(rows(job.out).values()) == list(rows(local.out).values())

    whole = contents(job.out)
    for name in names[2:5]:  # of a shard the end, of the next the beginning
        (job.out / name).unlink()
    asked = dict(server.asked)
    again = tokenize(replace(job, num_workers=2))
    assert contents(job.out) == whole and again.num_skipped == 5  # a hole: what is behind it is done again
    assert server.asked["2.tar"] == asked["2.tar"]
    with pytest.raises(InputError, match="remote shards make a file each"):
        tokenize(replace(job, out=tmp_path / "t.parquet"))


def test_a_remote_shard_that_breaks_is_taken_up_again_and_a_lost_one_later(job, server, tmp_path):
    job = replace(job, sources=(f"{server.url}/{{0..2}}.tar",), shard_rows=2)
    tokenize(replace(job, out=tmp_path / "expected"))
    server.hang_up_at["0.tar"] = 3000
    shard = tmp_path / "shards" / "1.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) // 2])
    done = tokenize(job)
    assert done.num_rows < 12 and [fault.key for fault in done.lost] == [f"{server.url}/1.tar"]
    assert any("1.tar: cannot be read" in failure for failure in done.failures)
    assert json.loads((job.out / "_manifest.json").read_text())["lost"]
    shard.write_bytes(good)
    done = tokenize(job)
    assert not done.lost and contents(job.out) == contents(tmp_path / "expected")


def test_remote_and_local_data_in_one(job, server, tmp_path):
    folder = pictures(tmp_path / "in", 3)
    sources = (f"{server.url}/2.tar", folder, f"{folder}/00.png")
    job = replace(job, sources=sources, shard_rows=2)
    tokenize(job)
    keys = TokenFiles.open([job.out]).keys()
    assert keys == [f"{server.url}/2.tar/0", "00.png", "01.png", "02.png", f"{folder}/00.png"]


# Back to pictures


def test_a_key_that_is_no_file_name(small_model, tmp_path):
    tokens = small_model.tokenize(Image.new("RGB", (32, 32))).numpy()
    keys = ["a\0b.jpg", "ü" * 300 + ".jpg"]
    write_token_file(tmp_path / "t.parquet", format_of(small_model), keys, tokens.repeat(2, 0))
    written = detokenize_files(small_model, [tmp_path / "t.parquet"], tmp_path / "out")
    assert [p.name for p in written] == ["a_b.png", "ü" * 100 + ".png"] and all(p.exists() for p in written)


def test_damaged_token_files_are_named(job, small_model, tmp_path):
    done = tokenize(replace(job, sources=(pictures(tmp_path / "in", 4),), out=tmp_path / "t.parquet"))
    (file,) = done.files
    good = file.read_bytes()
    for place in range(4, len(good), 29):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            detokenize_files(small_model, [file], tmp_path / "out")
        except InputError as error:
            assert "\n" not in str(error) and "t.parquet" in str(error)


def test_a_token_file_knows_its_grid(job, small_model, tmp_path):
    """Any model with the same weights rebuilds it in its own size."""
    job = replace(job, sources=(pictures(tmp_path / "in", 2),), image_size=(16, 48), out=tmp_path / "t.parquet")
    done = tokenize(job)
    assert TokenFiles.open(done.files).format.grid == (2, 6)
    wide = qlip.load(job.model, image_size=(16, 48))
    for model in (wide, small_model):
        files = detokenize_files(model, done.files, tmp_path / "out")
        expected = to_uint8(wide.detokenize(wide.tokenize(tmp_path / "in" / "01.png")))[0].permute(1, 2, 0)
        assert np.abs(np.asarray(Image.open(files[1])).astype(int) - expected.numpy()).max() <= 1
