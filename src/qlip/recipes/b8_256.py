"""`b8-256`: the paper's QLIP-B/8 at 256 pixels, stage 1.

The command of `b16-256` with this name and another --out. It differs in the patches of 8 pixels: 1,024 tokens an
image, four times the work. EVA-02's patch embedding and positions are resized when they are loaded.

Hardware: 128 GPUs of 80 GB. 512 pairs at once do not fit there by count, so the share goes in two parts of 256;
on an H200 try `--micro-batch-size 512`. About 7,300 GPU-hours of an H100 or H200 by count (docs/paper-scale.md),
not measured.

Expect, from the paper, not measured by us: 75.6% zero-shot on ImageNet-1k's validation set. It gives the
pictures' quality after stage 2 only (`b8-256-stage2`).
"""

from dataclasses import replace

from qlip.model.config import PRESETS
from qlip.recipes.b16_256 import RECIPE as B16

RECIPE = replace(B16, model=PRESETS["b8-256"], micro_batch_size=256)
