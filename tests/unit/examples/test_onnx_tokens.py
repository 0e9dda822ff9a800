"""The example that needs no PyTorch: the same tokens and the same picture as ours."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qlip
from qlip.eval.metrics import to_uint8

EXAMPLE = Path(__file__).parents[3] / "examples" / "onnx_tokens.py"
WITHOUT_US = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"torch", "qlip"} & sys.modules.keys()
"""


@pytest.mark.parametrize("name", ["cat.jpg", "windmill.jpg"])  # a landscape and a portrait
def test_tokens_and_picture_are_ours(exported_tiny, photos, tmp_path, name):
    (photo,) = [path for path in photos if path.name == name]
    command = [sys.executable, "-c", WITHOUT_US, EXAMPLE, exported_tiny, photo, tmp_path / "rebuilt.png"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = qlip.load("qlip-tiny")
    tokens = model.tokenize(photo)
    assert [json.loads(done.stdout)] == tokens.tolist()
    expected = to_uint8(model.detokenize(tokens))[0].permute(1, 2, 0).numpy()
    rebuilt = np.asarray(Image.open(tmp_path / "rebuilt.png"))
    assert np.abs(rebuilt.astype(int) - expected).max() <= 1
