"""`l14-392-stage2`: the paper's QLIP-L/14 at 392 pixels, stage 2.

The command of `b16-256-stage2` with this name and `--tokenizer runs/l14-392/model`.

Hardware: 128 GPUs of 80 GB, the share of 128 pictures in eight parts. About 4,200 GPU-hours of an H100 or H200
by count (docs/paper-scale.md), not measured.

Expect, from the paper, not measured by us: rFID 1.46, PSNR 25.36 dB, SSIM .6903 on ImageNet-1k's validation set.
"""

from dataclasses import replace

from qlip.recipes.b16_256_stage2 import RECIPE as B16

RECIPE = replace(B16, micro_batch_size=16)
