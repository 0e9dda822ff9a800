"""`b16-256-ablation`: QLIP-B/16 at 256 pixels on 2 B samples, as in the paper's ablations, stage 1.

The command of `b16-256` with this name and another --out. The paper gives the number of samples, not of steps:
at the batch of 65,536 these are 30,518 (2·10⁹ / 65,536 = 30,517.6). Warm-up and cosine are those of the long run
[inferred]. Set what is to be varied, for example `--reconstruction-weight 100`, or leave out `--init.vision` for
a random start.

Hardware: as `b16-256`. About 420 GPU-hours of an H100 or H200 by count (docs/paper-scale.md), not measured.

Expect, from the paper, not measured by us, as zero-shot % / rFID / PSNR dB on ImageNet-1k's validation set: 74.3
/ 35.3 / 24.5; reconstruction weight 1: 75.1 / 162.6 / 17.8; 100: 74.7 / 41.7 / 22.5; 10,000: 35.4 / 35.6 / 24.5;
random start 26.4 / 35.0 / 24.8; from EVA-CLIP 74.7 / 41.7 / 23.9.
"""

from dataclasses import replace

from qlip.recipes.b16_256 import RECIPE as B16

NUM_SAMPLES = 2_000_000_000

RECIPE = replace(B16, fit=replace(B16.fit, steps=round(NUM_SAMPLES / B16.batch_size)))
