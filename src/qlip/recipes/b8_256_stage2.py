"""`b8-256-stage2`: the paper's QLIP-B/8 at 256 pixels, stage 2.

The command of `b16-256-stage2` with this name and `--tokenizer runs/b8-256/model`.

Hardware: 128 GPUs of 80 GB, the share of 128 pictures in four parts. About 2,400 GPU-hours of an H100 or H200 by
count (docs/paper-scale.md), not measured.

Expect, from the paper, not measured by us: rFID 0.70, PSNR 26.79 dB, SSIM .7905 on ImageNet-1k's validation set.
"""

from dataclasses import replace

from qlip.recipes.b16_256_stage2 import RECIPE as B16

RECIPE = replace(B16, micro_batch_size=32)
