"""`b16-256-contrastive`: alignment alone, the baseline without reconstruction (a CLIP), stage 1.

The command of `b16-256` with this name and another --out. Quantizer and decoder stand still at their random
start. It lasts as long as `b16-256-ablation`.

Hardware: as `b16-256`. About 220 GPU-hours of an H100 or H200 by count (docs/paper-scale.md), not measured.

Expect, from the paper, not measured by us, as zero-shot % / rFID / PSNR dB on ImageNet-1k's validation set: 75.7
/ 367.8 / 11.7.
"""

from dataclasses import replace

from qlip.recipes.b16_256_ablation import RECIPE as ABLATION

RECIPE = replace(
    ABLATION,
    task=replace(ABLATION.task, reconstruction_weight=0.0, quantizer_weight=0.0, commitment_weight=0.0),
    fit=replace(ABLATION.fit, best="top1"),
)
