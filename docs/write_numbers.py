"""Writes the README's table of models and its picture from the bundled models: `python docs/write_numbers.py`."""

import json
from pathlib import Path

import qlip
from qlip.eval.pictures import reconstruction_grid

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "src" / "qlip" / "models"

# The paper's Table 2: zero-shot, rFID, PSNR, SSIM on ImageNet-1k validation.
PUBLISHED = """\
| `nvidia/QLIP-B-16-256` | 256 × 256 | 256 × 28 bits | 239.4 M | 74.3% | 23.16 dB | .6286 |
| `nvidia/QLIP-B-8-256` | 256 × 256 | 1,024 × 28 bits | 239.0 M | 75.6% | 26.79 dB | .7905 |
| `nvidia/QLIP-L-14-392` | 392 × 392 | 784 × 28 bits | 738.1 M | 79.1% | 25.36 dB | .6903 |"""


def row(folder: Path) -> str:
    """One line of the table for a bundled model."""
    model = qlip.load(folder.name)
    config, results = model.config, json.loads((folder / "results.json").read_text())["results"]
    size, millions = config.vision.image_size, sum(p.numel() for p in model.parameters()) / 1e6
    ssim = f"{results['ssim']:.4f}".lstrip("0")
    return (
        f"| [`{folder.name}`](src/qlip/models/{folder.name}/README.md), bundled | {size} × {size} "
        f"| {config.num_tokens:,} × {config.num_bits} bits | {millions:.1f} M | {results['top1']:.1%} of 200 "
        f"| {results['psnr']:.2f} dB | {ssim} |"
    )


def table() -> str:
    """The whole table, Markdown."""
    head = "| model | image | tokens | parameters | zero-shot top-1 | PSNR | SSIM |\n" + "| --- " * 7 + "|"
    ours = "\n".join(row(folder) for folder in sorted(MODELS.iterdir()) if (folder / "results.json").exists())
    return f"{head}\n{ours}\n{PUBLISHED}"


def main() -> None:
    """Rewrite what stands between the marks, and the picture."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split("-->\n", 1)
    _, after = rest.split("<!-- /models -->", 1)
    readme.write_text(f"{before}-->\n{table()}\n<!-- /models -->{after}", encoding="utf-8")
    samples = [
        {"image": photo.read_bytes()} for photo in sorted((MODELS.parent / "demo" / "photos").glob("*.jpg"))
    ]
    grid = reconstruction_grid(qlip.load("qlip-tiny"), samples, columns=6, zoom=2)
    grid.save(ROOT / "docs" / "images" / "qlip-tiny.png")


if __name__ == "__main__":
    main()
