"""`tiny-stage2`: better pictures from the tokens of `qlip-tiny`, which keep their ids, on a laptop.

    qlip train tiny-stage2 --data.train train.parquet --data.val val.parquet --out runs/tiny-stage2

300 steps of 32 pictures, half an hour on one CPU core that was shared with other work; most of it is the
perceptual network. This is what the bundled tokenizer had: on all 5,000 held-out Tiny-ImageNet photographs PSNR
fell from 21.14 to 20.93 dB, SSIM from .642 to .638, while ST-LPIPS of 250 of them went from .356 after 60 steps to
.296 (docs/results/qlip-tiny-stage2/log.jsonl): as in the paper, pictures look better and are a little further from
the original. With the paper's weight of 0.1 on the adversary and 5e-4 for the quantizer's MLPs so small a batch
fell apart: PSNR 19.3 after 100 steps.
"""

from qlip.recipes.run import DataConfig
from qlip.recipes.stage2 import Stage2Recipe
from qlip.train.fit import FitConfig
from qlip.train.stage2 import Stage2Config

RECIPE = Stage2Recipe(
    tokenizer="qlip-tiny",
    data=DataConfig(max_val=250),
    task=Stage2Config(
        freeze_ids=True,
        lr=1e-4,
        adversarial_weight=0.02,
        adversary="patchgan",
        discriminator_width=256,
        ema=0.98,
    ),
    fit=FitConfig(steps=300, warmup_steps=30, eval_every=60, save_every=60, best="perceptual"),
    batch_size=32,
)
