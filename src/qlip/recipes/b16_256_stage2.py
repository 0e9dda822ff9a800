r"""`b16-256-stage2`: the paper's QLIP-B/16 at 256 pixels, stage 2.

On each of 16 nodes with 8 GPUs:

    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m qlip.cli \
        train b16-256-stage2 --tokenizer runs/b16-256/model --data.train pairs/ --data.val imagenet-val/ \
        --out runs/b16-256-stage2

Begins with what stage 1 left (`--tokenizer`, also a hub id); words are not needed. 120,000 steps of 16,384
pictures are 2.0 B. Settings: docs/paper.md section 4; inferred are the crops, as in stage 1, and the adversary,
which is that of BSQ-ViT: the paper names none. LPIPS proper is asked for: its weights must be there
(docs/training.md section 3). The quantizer's down MLP learns too, so token ids change; `--freeze-ids` keeps
them.

Hardware: 128 GPUs of 80 GB, each with the paper's 128 pictures, in two parts: with all at once the penalty R1,
which is float32 and differentiated twice, leaves 80 GB behind by count, not measured. About 1,500 GPU-hours of
an H100 or H200 by count (docs/paper-scale.md), not measured; seven tenths of it the adversary's.

Expect, from the paper, not measured by us: rFID 3.21, PSNR 23.16 dB, SSIM .6286 on ImageNet-1k's validation set.
"""

from dataclasses import replace

from qlip.recipes.b16_256 import RECIPE as STAGE1
from qlip.recipes.stage2 import Stage2Recipe
from qlip.train.stage2 import Stage2Config

RECIPE = Stage2Recipe(
    data=STAGE1.data,
    task=Stage2Config(
        optimizer="adamw",
        lr=5e-4,
        decoder_lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        grad_clip=1.0,
        reconstruction_weight=1.0,
        quantizer_weight=1.0,
        perceptual_weight=0.1,
        perceptual="lpips",
        adversarial_weight=0.1,
        discriminator_lr=1e-4,
        ema=0.999,
    ),
    fit=replace(STAGE1.fit, best="perceptual"),
    batch_size=16_384,
    micro_batch_size=64,
    compile=True,
)
