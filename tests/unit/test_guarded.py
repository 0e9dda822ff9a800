"""What hostile files hold gives an InputError that names the field, or a value of the stated type."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from qlip.errors import InputError
from qlip.guarded import (
    MAX_DEPTH,
    Header,
    TensorInfo,
    check_layers,
    check_sizes,
    inside,
    parse_json,
    read_header,
    read_json,
    typed,
    weight_files,
)


@dataclass(frozen=True)
class Inner:
    size: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", "b"] = "a"
    grid: tuple[int, int] = (1, 1)
    scale: float | None = None
    sums: dict[str, str] | None = None
    flag: bool = False


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "",
        "{",
        b"\xff",
        "1" * 5000,
    ],
)
def test_what_is_not_json_of_some_depth_is_refused(text):
    with pytest.raises(InputError, match=r"nested deeper than 64 levels|is not valid JSON"):
        parse_json(text)


def test_json_is_what_the_standard_library_reads():
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for text in (deepest, '{"a": [1, 2.5, null, "[[[", true]}', "\ufeff[]", "[" + "[]," * 200 + "[]]"):
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text.removeprefix("\ufeff"))


def test_only_regular_files_of_some_size_are_read(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "link") == [1]
    with pytest.raises(InputError, match="more than 2 bytes"):
        read_json(tmp_path / "a.json", max_bytes=2)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(InputError, match="not a regular file"):
                read_json(path)


def test_values_become_the_stated_types():
    values = {"inner": {"size": 3, "names": ["x"]}, "kind": "b", "grid": [2, 3], "scale": 1, "sums": {"a": "b"}}
    assert typed(Outer, values) == Outer(Inner(3, ("x",)), "b", (2, 3), 1.0, {"a": "b"})
    assert typed(Outer, {"inner": {"size": 1, "more": 2}, "new": 0}, unknown="ignore") == Outer(Inner(1))
    assert typed(dict[str, Path], {"a": "b"}) == {"a": Path("b")} and typed(list[float], [1, 2.5]) == [1.0, 2.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": None}, "inner is None, not an object"),
        ({"inner": {}}, "it has no 'inner.size'"),
        ({"inner": {"size": True}}, "inner.size is True, not an integer"),
        ({"inner": {"size": 10**30}}, "inner.size is 10.*, not an integer of 64 bits"),
        ({"inner": {"size": 1.0}}, "inner.size is 1.0, not an integer"),
        ({"inner": {"size": 1, "names": "xy"}}, "inner.names is 'xy', not a list"),
        ({"inner": {"size": 1, "names": ["\ud800"]}}, r"inner.names\[0\] is '\\ud800', not valid Unicode"),
        ({"inner": {"size": 1, "names": [["x"]]}}, r"inner.names\[0\] is \['x'\], not a string"),
        ({"kind": "c"}, "kind is 'c', not one of 'a', 'b'"),
        ({"kind": ["a"]}, r"kind is \['a'\], not one of"),
        ({"grid": [1]}, r"grid is \[1\], not a list of 2"),
        ({"grid": {"0": 1}}, "grid is .* not a list"),
        ({"scale": float("nan")}, "scale is nan, not a finite number"),
        ({"scale": 10**400}, "scale is 10.*, not a finite number"),
        ({"scale": "1"}, "scale is '1', not a number"),
        ({"sums": []}, r"sums is \[\], not an object"),
        ({"sums": {"a": 1}}, "sums.a is 1, not a string"),
        ({"flag": 1}, "flag is 1, not true or false"),
        ({"more": 1}, "Outer has no field 'more'"),
    ],
)
def test_the_field_of_a_wrong_value_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        typed(Outer, {"inner": {"size": 1}} | changes)


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_header_is_what_safetensors_wrote(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(0, 5, dtype=torch.bfloat16), "c": torch.tensor(1)}
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt"})
    expected = {"a": TensorInfo("F32", (2, 3)), "b": TensorInfo("BF16", (0, 5)), "c": TensorInfo("I64", ())}
    assert read_header(tmp_path / "w.safetensors") == Header(expected, {"format": "pt"})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}},
            "bytes 0 to 16 of 8: the file is not whole",
        ),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, r"shape \[3\] has 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, "not whole"),
        ({"a": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 8]}}, "not an integer of 64 bits"),
        ({"a": {"dtype": 1, "shape": [2], "data_offsets": [0, 8]}}, "a.dtype is 1, not a string"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "it has no 'a.data_offsets'"),
        ({"a": []}, r"a is \[\], not an object"),
        ({"__metadata__": {"x": 1}}, "__metadata__.x is 1, not a string"),
        ([], r"its header is \[\], not an object"),
        (b"[" * 100_000, "nested deeper"),
    ],
)
def test_headers_that_are_not_of_their_file_are_refused(tmp_path, header, message):
    with pytest.raises(InputError, match=message):
        read_header(write_header(tmp_path / "w", header, bytes(8)))


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    for length in (0, 1, 3, 2**40, 2**64 - 1):
        with pytest.raises(InputError, match="header is said to have"):
            read_header(write_header(tmp_path / "w", {}, length=length))
    (tmp_path / "w").write_bytes(b"")
    with pytest.raises(InputError, match="header is said to have"):
        read_header(tmp_path / "w")


@pytest.mark.parametrize("name", ["../w", "/etc/passwd", "a/../../w", "", ".", "a\0b", "\ud800"])
def test_names_that_files_give_stay_in_their_folder(tmp_path, name):
    with pytest.raises(InputError, match="which is not in"):
        inside(tmp_path, name)
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="which is not in|not valid Unicode"):
        weight_files(tmp_path / "index.json")


def test_files_of_an_index_are_sorted_and_named_once(tmp_path):
    assert inside(tmp_path, "a/w") == tmp_path / "a/w"
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": "2", "b": "1", "c": "2"}}))
    assert weight_files(tmp_path / "index.json") == ["1", "2"]
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(InputError, match="weight_map is None, not an object"):
        weight_files(tmp_path / "index.json")


def test_sizes_that_no_model_has_are_refused():
    check_sizes({"width": 1, "length": 1 << 24})
    for size, message in ((0, "width is 0: it must be at least 1"), (sys.maxsize, "width is 9,.* at most")):
        with pytest.raises(InputError, match=message):
            check_sizes({"width": size})
    with pytest.raises(InputError, match="the config has 2 layers, the weights 1 tensors"):
        check_layers(2, Header({"a": TensorInfo("F32", ())}, {}))
