r"""`b16-256`: the paper's QLIP-B/16 at 256 pixels, stage 1.

On each of 16 nodes with 8 GPUs:

    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m qlip.cli \
        train b16-256 --data.train pairs/ --data.val imagenet-val/ --data.classes imagenet.json \
        --init.vision eva02_B_pt_in21k_p14.safetensors --init.text clip-vit-base-patch16/ \
        --vocabulary clip-vit-base-patch16/ --out runs/b16-256

239.4 M parameters, 256 tokens of 28 bits an image; 120,000 steps of 65,536 pairs are 7.9 B. Settings:
docs/paper.md section 4. Not there, and inferred: crops of 90–100% of the area, as EVA-CLIP takes them. EVA's
layer decay is not in the paper's table, and left out; `--layer-decay 0.75` has it.

Begins with EVA-02's masked image modelling in the vision encoder and CLIP's text tower; the rest is random.
Always give the vocabulary of that CLIP: without `--vocabulary` one is learnt from the captions, and CLIP's
embeddings would mean other words.

Hardware: 128 GPUs of 80 GB, each with the paper's 512 pairs. They fit at once where activations are computed
again; on fewer GPUs the same share goes in more parts of 512, with the same gradient. DDP: weights, gradients
and moments of so small a model are 4 GB. About 1,700 GPU-hours of an H100 or H200 by count
(docs/paper-scale.md), not measured.

Expect, from the paper, not measured by us: 74.3% zero-shot, PSNR 24.5 dB, rFID 35.3 on ImageNet-1k's validation
set; rFID falls in stage 2 (`b16-256-stage2`). The paper prints the same numbers for its ablation,
`b16-256-ablation`.
"""

from qlip.model.config import PRESETS
from qlip.recipes.run import DataConfig
from qlip.recipes.stage1 import Recipe
from qlip.train.fit import FitConfig
from qlip.train.stage1 import Stage1Config

RECIPE = Recipe(
    model=PRESETS["b16-256"],
    data=DataConfig(crop_scale=(0.9, 1.0), num_workers=8),
    task=Stage1Config(
        optimizer="lamb",
        lr=5e-4,
        vision_lr=2e-4,
        text_lr=2e-5,
        decoder_lr=2e-3,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        grad_clip=5.0,
        reconstruction_weight=1e3,
        alignment_weight=1.0,
        quantizer_weight=1.0,
        commitment_weight=1.0,
    ),
    fit=FitConfig(steps=120_000, warmup_steps=2000, eval_every=5000, save_every=1000),
    batch_size=65_536,
    micro_batch_size=512,
    recompute=True,
    compile=True,
)
