"""Tokenize a picture and rebuild it from its tokens, with NumPy, Pillow and ONNX Runtime alone.

qlip export qlip-tiny --format onnx --out exported
python onnx_tokens.py exported cat.jpg rebuilt.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder, picture, rebuilt = map(Path, sys.argv[1:])
config = json.loads((folder / "preprocessor_config.json").read_text())
crop = config["crop_size"]["width"], config["crop_size"]["height"]
mean, std = (np.float32(config[name])[:, None, None] for name in ("image_mean", "image_std"))
encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))

image = Image.open(picture).convert("RGB")
short, side = min(zip(image.size, crop, strict=True), key=lambda pair: pair[0] / pair[1])
resized = round(config["size"]["shortest_edge"] * side / min(crop))  # what the short side becomes
width, height = (int(resized * length / short) for length in image.size)
left, top = (width - crop[0]) // 2, (height - crop[1]) // 2
image = image.resize((width, height), config["resample"]).crop((left, top, left + crop[0], top + crop[1]))
pixel_values = (np.float32(image).transpose(2, 0, 1) / 255 - mean) / std

(tokens,) = encoder.run(["tokens"], {"pixel_values": pixel_values[None]})
(images,) = decoder.run(["images"], {"tokens": tokens})
Image.fromarray(np.rint(images[0] * 255).astype(np.uint8).transpose(1, 2, 0)).save(rebuilt)
print(json.dumps(tokens[0].tolist()))
