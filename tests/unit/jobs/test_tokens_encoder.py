"""The same token files from ONNX Runtime as from PyTorch: which goes on with which, and what is refused."""

import json
import logging
from dataclasses import replace

import pytest
from tests.unit.jobs.test_tokens import contents

from qlip.data.token_file import TokenFiles
from qlip.errors import InputError
from qlip.jobs.tokens import detokenize_files, tokenize
from qlip.jobs.tokens_job import Job
from qlip.model.checkpoint import load


@pytest.fixture
def on_onnx(exported_tiny, photos, tmp_path):
    """The photographs of the package, on ONNX Runtime."""
    sources = tuple(map(str, photos[4:11]))  # of whose latents none is within 4e-5 of zero
    settings = {"shard_rows": 3, "batch_size": 2, "num_workers": 0, "device": "cpu"}
    return Job(str(exported_tiny), sources, tmp_path / "onnx", engine="onnx", **settings)


def test_the_files_are_those_of_pytorch(on_onnx, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "qlip"):
        done = tokenize(on_onnx)
    assert caplog.text.count("computing on ONNX Runtime's CPUExecutionProvider") == 1 and done.num_rows == 7
    local = replace(on_onnx, model="qlip-tiny", engine="local", out=tmp_path / "local")
    tokenize(local)
    assert contents(on_onnx.out) == contents(local.out)
    ours, theirs = (json.loads((job.out / "_manifest.json").read_text()) for job in (on_onnx, local))
    used = ours.pop("environment")
    assert used["engine"] == "onnx" and used["device"] == "CPUExecutionProvider" and used["onnxruntime"]
    assert theirs.pop("environment")["engine"] == "local" and ours == theirs
    assert TokenFiles.open(done.files).format.model == "qlip-tiny"
    assert len(detokenize_files(load("qlip-tiny"), done.files, tmp_path / "pictures")) == 7


def test_each_goes_on_with_what_the_other_began(on_onnx):
    tokenize(on_onnx)
    whole = contents(on_onnx.out)
    local = replace(on_onnx, model="qlip-tiny", engine="local")
    for job in (on_onnx, local):
        (on_onnx.out / "tokens-00001.parquet").unlink()
        assert tokenize(job).num_skipped == 4 and contents(on_onnx.out) == whole


def test_the_command(run, on_onnx, exported_tiny, tmp_path):
    options = ["--out", tmp_path / "t.parquet", "--engine", "onnx", "--device", "cpu", "--num-workers", 0]
    code, _, err = run("tokenize", on_onnx.sources[0], "--model", exported_tiny, *options)
    assert code == 0 and "1 picture in" in err
    code, _, err = run("tokenize", on_onnx.sources[0], *options)
    assert code == 1 and "'qlip-tiny' holds no export (export.json): make one with" in err


def test_what_an_export_cannot_do(on_onnx):
    with pytest.raises(InputError, match="dtype='bfloat16': an exported encoder computes in float32"):
        tokenize(replace(on_onnx, dtype="bfloat16"))
    with pytest.raises(InputError, match="was exported for pictures of 64 × 64 pixels: export it again"):
        tokenize(replace(on_onnx, image_size=(64, 96)))
    with pytest.raises(InputError, match="or to `qlip tokenize` --engine onnx"):
        tokenize(replace(on_onnx, engine="local"))
    assert not on_onnx.out.exists()
    assert tokenize(replace(on_onnx, image_size=64)).num_rows == 7
