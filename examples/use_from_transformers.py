"""Use a tokenizer through Hugging Face transformers: `python examples/use_from_transformers.py [IMAGE]`."""

import sys
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import qlip
from qlip.integrations.transformers import export  # importing it teaches the Auto classes what a QLIP is

FOLDER = Path("qlip-tiny-transformers")
PHOTO = Path(qlip.__file__).parent / "demo" / "photos" / "goldfish.jpg"
WORDS = ["goldfish", "moose", "rocket", "flower"]


def main(image: str = str(PHOTO)) -> None:
    """Export the bundled tokenizer, load it as any model of transformers, and look at a picture with it."""
    export(qlip.load("qlip-tiny"), FOLDER)  # qlip export qlip-tiny --format transformers --out FOLDER
    model = AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)

    inputs = processor(images=image, return_tensors="pt")
    inputs |= tokenizer([f"a photo of a {word}." for word in WORDS], padding=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits_per_image.softmax(-1)[0]
        states = model.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states
        codes = model.quantize(model.encode(inputs["pixel_values"]))
        reconstruction = model.decode(codes)
    print("  ".join(f"{word} {p:.1%}" for word, p in zip(WORDS, probabilities.tolist(), strict=True)))
    print(f"features of the layer before last: {tuple(states[-2][:, 1:].shape)}")
    print(f"tokens: {model.codes_to_tokens(codes)[0, :4].tolist()} … of {codes.shape[1]}")
    print(f"rebuilt: {tuple(reconstruction.shape)}, normalised")


if __name__ == "__main__":
    main(*sys.argv[1:])
