import io
import os
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qlip.data.token_file import TokenFiles, token_writer
from qlip.errors import InputError
from qlip.eval.metrics import to_uint8
from qlip.jobs.pictures import Pictures
from qlip.jobs.tokens import detokenize_files, token_format, tokenize_files
from qlip.model import QLIP


def pictures(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.mark.skipif(os.name == "nt", reason="file names are UTF-16")
def test_a_name_that_is_not_utf8(small_model, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.jpg"))
    path.write_bytes(file.getvalue())
    written, count, failures = tokenize_files(small_model, [path], tmp_path / "t.parquet")
    assert count == 1 and not failures
    assert TokenFiles.open(written).keys() == [f"{tmp_path}/bad\\xff.jpg"]
    assert detokenize_files(small_model, written, tmp_path / "out") == [tmp_path / "out/bad\\xff.png"]


@pytest.mark.parametrize(("rows", "sizes"), ((3, [3, 3, 3, 1]), (5, [5, 5]), (40, [10])))
def test_every_shard_but_the_last_is_full(small_model, tmp_path, monkeypatch, rows, sizes):
    monkeypatch.setattr("qlip.jobs.tokens.SHARD_ROWS", rows)
    folder = pictures(tmp_path / "in", 10)
    monkeypatch.setattr("qlip.jobs.tokens.Pictures", partial(Pictures, batch_size=4))
    written, count, _ = tokenize_files(small_model, [folder], tmp_path / "shards")
    assert count == 10 and [pq.read_metadata(f).num_rows for f in written] == sizes
    assert TokenFiles.open(written).keys() == [str(folder / f"{i}.png") for i in range(10)]
    expected = small_model.tokenize([folder / f"{i}.png" for i in range(10)]).numpy()
    assert (np.concatenate([ids for _, ids in TokenFiles.open(written).batches()]) == expected).all()


def test_a_key_that_is_no_file_name(small_model, tmp_path):
    tokens = small_model.tokenize(Image.new("RGB", (32, 32))).numpy()
    with token_writer(tmp_path / "t.parquet", token_format(small_model)) as write:
        write(["a\0b.jpg", "ü" * 300 + ".jpg"], tokens.repeat(2, 0))
    written = detokenize_files(small_model, [tmp_path / "t.parquet"], tmp_path / "out")
    assert [p.name for p in written] == ["a_b.png", "ü" * 100 + ".png"] and all(p.exists() for p in written)


def test_damaged_token_files_are_named(small_model, tmp_path):
    (file,), *_ = tokenize_files(small_model, [pictures(tmp_path / "in", 4)], tmp_path / "t.parquet")
    good = file.read_bytes()
    for place in range(4, len(good), 7):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            detokenize_files(small_model, [file], tmp_path / "out")
        except InputError as error:
            assert "\n" not in str(error) and "t.parquet" in str(error)


def test_a_token_file_knows_its_grid(small_model, tmp_path):
    """Any model with the same weights rebuilds it in its own size."""
    size = (16, 48)
    wide = QLIP(small_model.config.at_size(size), image_processor=small_model.image_processor.at_size(size)).eval()
    wide.load_state_dict(small_model.state_dict())
    written, *_ = tokenize_files(wide, [pictures(tmp_path / "in", 2)], tmp_path / "t.parquet")
    assert TokenFiles.open(written).format.grid == (2, 6)
    for model in (wide, small_model):
        files = detokenize_files(model, written, tmp_path / "out")
        expected = to_uint8(wide.detokenize(wide.tokenize(tmp_path / "in" / "1.png")))[0].permute(1, 2, 0)
        assert np.abs(np.asarray(Image.open(files[1])).astype(int) - expected.numpy()).max() <= 1
