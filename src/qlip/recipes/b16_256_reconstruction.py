"""`b16-256-reconstruction`: reconstruction alone, the baseline without words (a BSQ autoencoder), stage 1.

The command of `b16-256` with this name and another --out; --init.text has no effect here. The text tower stands
still, so its vocabulary matters for the checkpoint's layout only. It lasts as long as `b16-256-ablation`.

Stage 2: `qlip train b16-256-stage2 --tokenizer runs/b16-256-reconstruction/model`.

Hardware: as `b16-256`. About 400 GPU-hours of an H100 or H200 by count (docs/paper-scale.md), not measured.

Expect, from the paper, not measured by us, as zero-shot % / rFID / PSNR dB on ImageNet-1k's validation set: 0.1
/ 35.7 / 24.5. BSQ-ViT B/16, reproduced by the paper's authors in a training of its own: rFID 3.81, PSNR 24.12,
SSIM .6638.
"""

from dataclasses import replace

from qlip.recipes.b16_256_ablation import RECIPE as ABLATION

RECIPE = replace(ABLATION, task=replace(ABLATION.task, alignment_weight=0.0))
