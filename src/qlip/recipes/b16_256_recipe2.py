"""`b16-256-recipe2`: stage 1 without the quantizer, Recipe 2 of the paper's Table 3c.

The command of `b16-256` with this name and another --out. Patch features go to the decoder as they are; the
quantizer's MLPs do not learn. It lasts as long as `b16-256-ablation`, with which to compare it.

Its stage 2 has the ordinary settings, `qlip train b16-256-stage2 --tokenizer runs/b16-256-recipe2/model`, where
the quantizer's MLPs start at random; never with `--freeze-ids`, which would freeze a random down MLP.

Hardware and hours: as `b16-256-ablation`.

Expect, from the paper, not measured by us, as zero-shot % / rFID / PSNR dB on ImageNet-1k's validation set: 75.0
/ 17.2 / 26.72, without the quantizer in between (our evaluation goes through it, so its PSNR tells nothing
here); after stage 2 rFID 13.7, PSNR 23.34.
"""

from dataclasses import replace

from qlip.recipes.b16_256_ablation import RECIPE as ABLATION

RECIPE = replace(
    ABLATION,
    task=replace(ABLATION.task, quantize=False, quantizer_weight=0.0, commitment_weight=0.0),
    fit=replace(ABLATION.fit, best="top1"),  # a PSNR through the untrained quantizer says nothing
)
