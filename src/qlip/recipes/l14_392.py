r"""`l14-392`: the paper's QLIP-L/14 at 392 pixels, stage 1.

On each of 16 nodes with 8 GPUs:

    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m qlip.cli \
        train l14-392 --data.train pairs/ --data.val imagenet-val/ --data.classes imagenet.json \
        --init.vision eva02_L_pt_m38m_p14.safetensors --init.text clip-vit-large-patch14/ \
        --vocabulary clip-vit-large-patch14/ --out runs/l14-392

738.1 M parameters, 784 tokens of 28 bits an image. Otherwise as `b16-256`. Which of EVA-02-L's two
masked-modelling files the paper took (pt_m38m or pt_in21k) it does not say.

Hardware: 128 GPUs of 80 GB, the share of 512 pairs in four parts of 128, activations computed again; on an H200
try `--micro-batch-size 256`. DDP: weights, gradients and moments are 12 GB. About 18,000 GPU-hours of an H100 or
H200 by count (docs/paper-scale.md), not measured.

Expect, from the paper, not measured by us: 79.1% zero-shot on ImageNet-1k's validation set. It gives the
pictures' quality after stage 2 only (`l14-392-stage2`).
"""

from dataclasses import replace

from qlip.model.config import PRESETS
from qlip.recipes.b16_256 import RECIPE as B16

RECIPE = replace(B16, model=PRESETS["l14-392"], micro_batch_size=128)
