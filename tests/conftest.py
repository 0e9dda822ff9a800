"""What several test files need: a tiny model, a small data set, real photographs."""

import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import qlip
import qlip.demo
from qlip import cli
from qlip.model import QLIP, ImageTowerConfig, QLIPConfig, QuantizerConfig, TextConfig
from qlip.model.image import ImageProcessor
from qlip.model.text import TextTokenizer

PHOTOS = Path(qlip.demo.__file__).parent / "photos"
LABELS = ("red square", "green square", "blue square", "grey square")


def small_config(**changes) -> QLIPConfig:
    tower = ImageTowerConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        rope=True,
        swiglu=True,
        subln=True,
        k_bias=False,
    )
    text = TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=600,
        max_position_embeddings=16,
        bos_token_id=598,
        eos_token_id=599,
        pad_token_id=599,
    )
    settings = {"vision": tower, "decoder": tower, "text": text, "projection_dim": 16}
    return QLIPConfig(**settings | {"quantizer": QuantizerConfig(inv_temperature=10.0)} | changes)


@pytest.fixture
def small_model() -> QLIP:
    """A random model of 16 tokens for 32-pixel images, with processor and vocabulary."""
    vocabulary = TextTokenizer.train([f"a photo of a {label}." for label in LABELS], 600, 16)
    text = small_config().text
    specials = {k: getattr(vocabulary, k) for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    return QLIP(
        small_config(text=TextConfig(**{**text.__dict__, **specials})),
        name="small",
        image_processor=ImageProcessor(resize=32, crop=32),
        text_tokenizer=vocabulary,
    ).eval()


@pytest.fixture(scope="session")
def exported_tiny(tmp_path_factory) -> Path:
    """A folder of `qlip export qlip-tiny --format onnx`; it takes a dozen seconds."""
    pytest.importorskip("onnxscript")
    from qlip.integrations import onnx

    folder = tmp_path_factory.mktemp("exported")
    onnx.export(qlip.load("qlip-tiny"), folder)
    return folder


@pytest.fixture
def photos() -> list[Path]:
    """The photographs that the package ships."""
    return sorted(PHOTOS.glob("*.jpg"))


@pytest.fixture(autouse=True)
def _own_log_handlers(monkeypatch):
    """`cli.main` gives its process a handler for the stderr of now, which ends with the test."""
    monkeypatch.setattr(logging.getLogger("qlip"), "handlers", [])


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `qlip ARGUMENTS…` in this process; gives exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["qlip", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit_.value.code, captured.out, captured.err

    return call


def encoded(color: int, seed: int, size: int = 32) -> bytes:
    """A noisy square of one of four colours, as PNG."""
    rng = np.random.default_rng((color, seed))
    base = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [128, 128, 128]])[color]
    pixels = np.clip(base + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def color_data(tmp_path) -> Path:
    """A folder with train.parquet (64 rows), val.parquet (16 rows) and classes.json: coloured squares."""
    folder = tmp_path / "colors"
    folder.mkdir()
    for name, count, offset in (("train", 64, 0), ("val", 16, 1000)):
        rows = [{"bytes": encoded(i % 4, offset + i), "path": f"{i}.png"} for i in range(count)]
        table = pa.table({"image": rows, "label": pa.array([i % 4 for i in range(count)], pa.int16())})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=10)
    (folder / "classes.json").write_text(json.dumps([{"names": [label]} for label in LABELS]))
    return folder
