import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlip.data.token_dataset import TokenDataset
from qlip.data.token_file import TokenFiles, TokenFormat, is_as_written, read_origin, write_token_file
from qlip.errors import InputError

FORMAT = TokenFormat("small", "0123456789abcdef", 28, (2, 3))


def write(path, keys, tokens, token_format=FORMAT):
    write_token_file(path, token_format, keys, np.asarray(tokens))
    return path


@pytest.mark.parametrize(("bits", "dtype"), ((28, "uint32"), (32, "uint32"), (33, "uint64"), (63, "uint64")))
def test_ids_come_back_exactly(tmp_path, bits, dtype):
    top = 2**bits - 1
    tokens = np.array([[0, 1, top, top - 1, top // 2, 5]] * 3, dtype=np.uint64)
    token_format = TokenFormat("small", "0" * 16, bits, (2, 3))
    file = write(tmp_path / "t.parquet", ["a", "b", "ü/c d"], tokens, token_format)
    source = TokenFiles.open([file])
    ((keys, found),) = source.batches()
    assert keys == source.keys() == ["a", "b", "ü/c d"]
    assert found.dtype == dtype and (found == tokens).all()
    assert source.format == token_format and source.format.dtype == dtype


def test_metadata_says_whose_ids_they_are(tmp_path):
    schema = pq.read_schema(write(tmp_path / "t.parquet", ["a"], [[1] * 6]))
    assert json.loads(schema.metadata[b"qlip"]) == {
        "model": "small",
        "id_hash": "0123456789abcdef",
        "bits": 28,
        "grid": [2, 3],
        "dtype": "uint32",
        "format_version": 1,
    }
    assert str(schema.field("tokens").type) == "fixed_size_list<element: uint32>[6]"


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    file = write(tmp_path / "t.parquet", ["a"], [[1] * 6])

    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("qlip.data.token_file.pq.ParquetWriter", full)
    for name in ("t.parquet", "new.parquet"):
        with pytest.raises(InputError, match=rf"{name} cannot be written \(No space left"):
            write(tmp_path / name, ["b"], [[2] * 6])
    assert list(tmp_path.iterdir()) == [file] and TokenFiles.open([file]).keys() == ["a"]


def test_words_and_origin(tmp_path):
    file, ids = tmp_path / "t.parquet", np.arange(12).reshape(2, 6)
    kept = {"captions": [["a cat", "ü"], None], "label": [None, 2**40]}
    write_token_file(file, FORMAT, ["a", "b"], ids, kept, {"unit": 3})
    assert pq.read_table(file).select(["captions", "label"]).to_pydict() == kept
    assert TokenFiles.open([file]).format == FORMAT and read_origin(file) == {"unit": 3}
    first = file.read_bytes()
    write_token_file(file, FORMAT, ["a", "b"], ids, kept, {"unit": 3})
    assert file.read_bytes() == first
    assert read_origin(write(file, ["a"], [[1] * 6])) == {}
    metadata = FORMAT.schema().metadata | {b"qlip_origin": b"{"}
    pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)
    with pytest.raises(InputError, match=r"t\.parquet: its `qlip_origin` metadata is damaged"):
        read_origin(file)


def test_the_library_datasets_reads_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    ids = np.arange(12).reshape(2, 6) + 2**27
    for i in range(2):
        write_token_file(tmp_path / f"{i}.parquet", FORMAT, ["a", "b"], ids + i, {"caption": ["a cat", None]})
    files = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["key"] == ["a", "b"] * 2 and table["caption"] == ["a cat", None] * 2
    assert (np.array(table["tokens"]) == np.concatenate([ids, ids + 1])).all()
    assert table.features["tokens"].length == 6 and table.features["tokens"].feature.dtype == "uint32"


def test_files_of_different_tokenizers_do_not_mix(tmp_path):
    write(tmp_path / "a.parquet", ["a"], [[1] * 6])
    write(tmp_path / "b.parquet", ["b"], [[1] * 6], TokenFormat("other", "f" * 16, 28, (2, 3)))
    with pytest.raises(InputError, match=r"b\.parquet holds ids ffff"):
        TokenFiles.open([tmp_path])


def test_files_of_different_grids_do_not_mix(tmp_path):
    write(tmp_path / "a.parquet", ["a"], [[1] * 6])
    write(tmp_path / "b.parquet", ["b"], [[1] * 6], replace(FORMAT, grid=(3, 2)))
    with pytest.raises(InputError, match=r"b\.parquet holds 3 × 2 tokens a picture, .*a\.parquet 2 × 3"):
        TokenFiles.open([tmp_path])


def test_other_files_are_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: not a token file"):
        TokenFormat.read(tmp_path / "x.parquet")
    huge = json.dumps(dict(FORMAT.__dict__, grid=[10**12, 10**12]))
    for value in ("{", "[]", '{"format_version": 1}', b"\xff", huge):
        pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"qlip": value}), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=r"x\.parquet: its `qlip` metadata is damaged"):
            TokenFormat.read(tmp_path / "x.parquet")
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(FORMAT.schema().metadata), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: its columns are .*a: int64.*it needs `key`"):
        TokenFormat.read(tmp_path / "x.parquet")
    newer = TokenFormat("small", "0" * 16, 28, (2, 3), format_version=2)
    with pytest.raises(InputError, match="version 2 is newer"):
        TokenFiles.open([write(tmp_path / "n.parquet", ["a"], [[1] * 6], newer)])


def test_damaged_pages_and_empty_cells_are_named(tmp_path):
    file = write(tmp_path / "t.parquet", ["a", "b"], np.arange(12).reshape(2, 6))
    good = file.read_bytes()
    start = pq.read_metadata(file).row_group(0).column(1).data_page_offset
    file.write_bytes(good[: start + 40] + bytes([good[start + 40] ^ 1]) + good[start + 41 :])
    with pytest.raises(InputError, match=r"t\.parquet: not a readable Parquet file") as raised:
        list(TokenFiles.open([file]).batches())
    assert "\n" not in str(raised.value)
    for keys, ids in ((["a", None], [[1] * 6] * 2), (["a", "b"], [[1] * 6, None])):
        pq.write_table(pa.table({"key": keys, "tokens": ids}, schema=FORMAT.schema()), file)
        source = TokenFiles.open([file])
        with pytest.raises(InputError, match=r"t\.parquet: .*has no (key|ids)"):
            source.keys(), list(source.batches())


def test_files_that_others_changed_are_read(tmp_path):
    """Another order, a further column, large strings, a dictionary, and lists without a fixed length."""
    file, ids = write(tmp_path / "t.parquet", ["a", "b"], np.arange(12).reshape(2, 6)), np.arange(12).reshape(2, 6)
    table = pq.read_table(file)
    metadata = table.schema.metadata
    changes = {
        "order": table.select(["tokens", "key"]),
        "more": table.append_column("split", [["train", None]]),
        "large": table.set_column(0, "key", table["key"].cast(pa.large_string())),
        "dictionary": table.set_column(0, "key", table["key"].dictionary_encode()),
        "lists": table.set_column(1, "tokens", table["tokens"].cast(pa.list_(pa.uint32()))),
    }
    for name, changed in changes.items():
        pq.write_table(changed.replace_schema_metadata(metadata), tmp_path / f"{name}.parquet")
        source = TokenFiles.open([tmp_path / f"{name}.parquet"])
        ((keys, found),) = source.batches()
        assert keys == source.keys() == ["a", "b"] and (found == ids).all()
        rows = TokenDataset(tmp_path / f"{name}.parquet", bits=28)
        assert rows[1]["key"] == "b" and rows[1]["sub_tokens"].flatten().tolist() == ids[1].tolist()
    short = pa.array([[1] * 6, [1] * 5], pa.list_(pa.uint32()))
    pq.write_table(table.set_column(1, "tokens", short).replace_schema_metadata(metadata), file)
    with pytest.raises(InputError, match=r"t\.parquet: a row has not the 6 ids of the others"):
        list(TokenFiles.open([file]).batches())
    wide = table.set_column(1, "tokens", table["tokens"].cast(pa.list_(pa.uint64(), 6)))
    pq.write_table(wide.replace_schema_metadata(metadata), file)
    with pytest.raises(
        InputError, match=r"t\.parquet: its columns are .* it needs `key`, text, and `tokens`, lists of 6"
    ):
        TokenFiles.open([file])


def test_any_flipped_byte_is_seen(tmp_path):
    file = write(tmp_path / "t.parquet", ["a"], [[1] * 6])
    assert is_as_written(file)
    good = file.read_bytes()
    for place in range(4, len(good) - 8, 7):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            metadata = pq.read_metadata(file).metadata or {}
            assert b"qlip_sha256" not in metadata or not is_as_written(file), place  # without a name it is no sum
        except (InputError, OSError, pa.ArrowException):
            continue


def test_a_folder_is_a_data_set_for_others_and_whole_for_us(tmp_path):
    for i in range(2):
        write_token_file(tmp_path / f"tokens-{i}.parquet", FORMAT, ["a"], np.ones((1, 6)), origin={"unit": i})
    with pytest.raises(InputError, match=r"has no _manifest\.json, so it may not be whole"):
        TokenFiles.open([tmp_path])
    assert len(TokenFiles.open(sorted(tmp_path.glob("*.parquet"))).keys()) == 2
    shards = [{"name": f"tokens-{i}.parquet", "num_rows": 1} for i in range(2)]
    manifest = {"format": FORMAT.describe(), "shards": shards, "sha256": {}, "failures": [], "lost": []}
    for name in ("manifest.json", "_manifest.json"):  # by the old name, too
        (tmp_path / name).write_text(json.dumps(manifest))
        assert len(TokenFiles.open([tmp_path]).keys()) == 2
        (tmp_path / "tokens-1.parquet").rename(tmp_path / "away")
        with pytest.raises(InputError, match=r"tokens-1\.parquet is missing, but in _manifest\.json"):
            TokenFiles.open([tmp_path])
        (tmp_path / "away").rename(tmp_path / "tokens-1.parquet")
        (tmp_path / "manifest.json").unlink(missing_ok=True)
    assert pq.read_table(tmp_path).num_rows == 2
