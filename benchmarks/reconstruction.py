r"""What tokenizers rebuild of the same held-out pictures, side by side.

    python benchmarks/reconstruction.py qlip-tiny runs/tiny-stage2/model --val val.parquet \
        --max-val 250 --out docs/results/tiny-stage2.json

PSNR, SSIM, a perceptual distance (LPIPS where its weights are, else ST-LPIPS), the name of the ids, code use.
"""

import json
from pathlib import Path

import tyro

import qlip
from qlip.data.parquet import ParquetSamples
from qlip.environment import environment, resolve_device
from qlip.eval.protocols import reconstruction
from qlip.train.perceptual import load_perceptual


def main(
    models: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    val: tuple[Path, ...],
    out: Path,
    max_val: int = 1000,
    device: str = "auto",
) -> None:
    """Measure tokenizers on at most `max_val` held-out pictures, evenly spread, and write JSON."""
    place = resolve_device(device)
    samples = ParquetSamples(val)
    count = min(max_val, len(samples))
    chosen = [samples[i * len(samples) // count] for i in range(count)]
    perceptual = load_perceptual().to(place)
    results = {}
    for name in models:
        model = qlip.load(name, device=place)
        results[name] = {"ids": model.id_hash()} | reconstruction(model, chosen, perceptual=perceptual)
        print(name, results[name])
    variant = "ST-LPIPS" if perceptual.shift_tolerant else "LPIPS"
    record = {
        "results": results,
        "perceptual": variant,
        "num_samples": count,
        "environment": environment(str(place)),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
