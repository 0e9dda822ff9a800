"""Files that somebody else wrote: good ones of each kind, how they are changed, and how they are read."""

import hashlib
import io
import json
import random
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tests.fuzz.mutations import Change, change_bytes, change_json, change_lines, change_png, change_tar

from qlip.data.captions import read_class_names
from qlip.data.samples import BadSample
from qlip.data.sources import open_samples
from qlip.data.token_file import TokenFiles, TokenFormat, read_origin, read_token_manifest, write_token_file
from qlip.guarded import read_header, read_object
from qlip.integrations.parts import read_export
from qlip.jobs.generate import read_prompts
from qlip.jobs.tokens_check import stats
from qlip.lm.checkpoint import read_config as read_lm_config
from qlip.model.checkpoint import BUNDLED
from qlip.model.config import QLIPConfig
from qlip.model.image import ImageProcessor
from qlip.model.text import TextTokenizer
from qlip.t2i.checkpoint import read_config as read_t2i_config
from qlip.train.log import read_log
from qlip.um3.checkpoint import read_config as read_um3_config
from qlip.um3.sources import read_texts


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: under which it is written, in a folder of its own.
        seeds: good ones.
        change: one of them, changed.
        read: what a command does with it; takes the path.
    """

    name: str
    seeds: tuple[bytes, ...]
    change: Change
    read: Callable[[Path], Any]


def targets() -> dict[str, Target]:
    """All of them, by what they are called in a report."""
    return _of_data() | _of_tokens() | _of_models()


def _of_data() -> dict[str, Target]:
    shards = (_shard(tarfile.GNU_FORMAT), _shard(tarfile.PAX_FORMAT))
    csv = b"image,caption,label\n0.png,a cat,1\n1.png,a dog,2\n"
    tsv = b"path\tcaptions\n0.png\ta cat\n1.png\ta dog\n"
    jsonl = b"\n".join(
        json.dumps({"image": f"{i}.png", "caption": "a cat", "label": i}).encode() for i in range(3)
    )
    classes = ["a cat", ["a dog", "a puppy"], {"names": ["a hen"], "wnid": "n01"}]
    return {
        "image": Target("a.png", _images(), change_png, _read_image),
        "shard": Target("s.tar", shards, change_tar, _read_samples),
        "csv": Target("a.csv", (csv,), change_lines, _read_samples),
        "tsv": Target("a.tsv", (tsv,), change_lines, _read_samples),
        "jsonl": Target("a.jsonl", (jsonl,), change_lines, _read_samples),
        "parquet": Target("p.parquet", (_parquet(),), change_bytes, _read_samples),
        "classes": Target("classes.json", _json(classes), change_json, read_class_names),
        "prompts": Target("p.txt", ("a cat\na dog\u2028a hen\n".encode(),), change_lines, read_prompts),
        "texts": Target("a.jsonl", (b'{"text": "a cat"}\n{"text": "a dog"}\n',), change_lines, _read_texts),
    }


def _of_tokens() -> dict[str, Target]:
    shards = [{"name": "a.parquet", "num_rows": 1}]
    manifest: dict[str, Any] = {"format": _FORMAT.describe(), "shards": shards, "sha256": {"a.parquet": "0"}}
    manifest |= {"failures": [{"key": "b", "reason": "damaged"}], "lost": []}
    return {
        "token file": Target("t.parquet", (_token_file(),), _change_token_file, _read_tokens),
        "token manifest": Target("_manifest.json", _json(manifest), change_json, _in(read_token_manifest)),
    }


def _of_models() -> dict[str, Target]:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    export: dict[str, Any] = {"format": "onnx", "format_version": 1, "model": "a", "id_hash": "0" * 16, "bits": 28}
    export |= {"grid": [4, 4], "logit_scale": 1.0, "sha256": {"a.onnx": hashlib.sha256().hexdigest()}}
    log = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n'
    vocabulary = _bundled("qlip-tiny", "tokenizer.json")
    processor = _bundled("qlip-tiny", "preprocessor_config.json")
    config, t2i, lm = (_bundled(name, "config.json") for name in ("qlip-tiny", "t2i-tiny", "um3-tiny"))
    return {
        "safetensors": Target("w.safetensors", (_with_length(*_json(header)),), _change_header, read_header),
        "config": Target("config.json", config, change_json, _read_qlip),
        "vocabulary": Target(
            "tokenizer.json", vocabulary, change_json, _in(partial(TextTokenizer.find, context_length=16))
        ),
        "preprocessor": Target("preprocessor_config.json", processor, change_json, ImageProcessor.from_file),
        "t2i config": Target("config.json", t2i, change_json, _in(read_t2i_config)),
        "lm config": Target("config.json", lm, change_json, _in(read_lm_config)),
        "um3 config": Target("um3.json", _bundled("um3-tiny", "um3.json"), change_json, _read_um3),
        "export": Target("export.json", _json(export), change_json, _read_export),
        "log": Target("log.jsonl", (log,), change_lines, read_log),
    }


def _in(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: read(path.parent)


_FORMAT = TokenFormat("qlip-tiny", "0" * 16, 28, (2, 3))


def _json(value: Any) -> tuple[bytes, ...]:
    return (json.dumps(value).encode(),)


def _bundled(model: str, name: str) -> tuple[bytes, ...]:
    return ((BUNDLED / model / name).read_bytes(),)


def _with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(8)


def _images() -> tuple[bytes, ...]:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    found = []
    for kind, options in {
        "PNG": {}, "JPEG": {"progressive": True}, "WEBP": {}, "GIF": {}, "BMP": {}, "PPM": {},
        "TIFF": {"compression": "tiff_lzw"}, "JPEG2000": {}, "ICO": {"sizes": [(16, 16)]},
    }.items():  # fmt: skip
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **options)
        found.append(file.getvalue())
    for mode in ("P", "LA", "I;16", "1"):
        file = io.BytesIO()
        image = Image.fromarray(pixels).convert("L")
        (image.convert(mode) if mode != "I;16" else image.convert("I").convert("I;16")).save(file, "PNG")
        found.append(file.getvalue())
    return tuple(found)


def _shard(kind: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, contents in {
            "0.png": _PNG, "0.json": b'{"caption": "a cat", "label": 3}', "1.png": _PNG, "1.txt": b"a dog\nhi",
            "1.cls": b"4", f"{'x' * 150}.png": _PNG, "\u732b.png": _PNG,
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return file.getvalue()


def _parquet() -> bytes:
    image = [{"bytes": _PNG, "path": None}, {"bytes": None, "path": "0.png"}]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": image, "caption": ["a cat", None], "label": [1, 2]}), file)
    return file.getvalue()


def _token_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        ids = np.arange(18).reshape(3, 6)
        write_token_file(path, _FORMAT, ["a", "b", "c"], ids, {"caption": ["a cat", None, ""]}, {"unit": 0})
        return path.read_bytes()


_PNG = _images()[0]


def _change_token_file(rng: random.Random, data: bytes) -> bytes:
    """What is said of the ids, or the types of the columns, or bytes."""
    if rng.random() < 0.4:
        return change_bytes(rng, data)
    table = pq.read_table(pa.BufferReader(data))
    metadata = dict(table.schema.metadata)
    for key in rng.sample(sorted(metadata), rng.randint(0, 2)):
        metadata[key] = change_json(rng, metadata[key])
    if rng.random() < 0.3:
        ids = table["tokens"].to_pylist()
        ids[rng.randrange(3)] = rng.choice((None, [], [1], [1 << 31] * 6, [0, None, 1, 1, 1, 1]))
        table = table.set_column(1, "tokens", pa.array(ids, pa.list_(pa.uint32())))
    if rng.random() < 0.3:
        keys = pa.array(rng.choice(([None] * 3, ["a"] * 3, [b"\xff", b"", b"a"], [1, 2, 3])))
        table = table.set_column(0, "key", keys)
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), file)
    return file.getvalue()


def _change_header(rng: random.Random, data: bytes) -> bytes:
    text = change_json(rng, data[8:-8])
    length = rng.choice((len(text), len(text), len(text), 0, len(text) + 1, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + text + bytes(rng.choice((8, 8, 0, 7)))


@cache
def _processor() -> ImageProcessor:
    return ImageProcessor.from_file(BUNDLED / "qlip-tiny" / "preprocessor_config.json")


def _read_image(path: Path) -> None:
    _processor().preprocess(path.read_bytes())


def _read_samples(path: Path) -> None:
    path.with_name("0.png").write_bytes(_PNG)
    samples = open_samples([path])
    for i in range(min(len(samples), 50)):  # type: ignore[arg-type]
        try:
            sample = samples[i]  # type: ignore[index]
            json.dumps(sample | {"image": ""}, allow_nan=False, ensure_ascii=False).encode()
        except BadSample:
            continue
    list(samples.captions())


def _read_tokens(path: Path) -> None:
    read_origin(path)
    source = TokenFiles.open([path])
    source.keys()
    stats([path])


def _read_qlip(path: Path) -> None:
    QLIPConfig.from_dict(read_object(path)).to_dict()


def _read_um3(path: Path) -> None:
    path.with_name("config.json").write_bytes((BUNDLED / "um3-tiny" / "config.json").read_bytes())
    read_um3_config(path.parent)


def _read_texts(path: Path) -> None:
    list(read_texts(str(path), "text"))


def _read_export(path: Path) -> None:
    path.with_name("a.onnx").touch()
    read_export(path.parent, "onnx")
