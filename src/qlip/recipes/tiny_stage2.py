"""`tiny-stage2`: better pictures from the tokens of `qlip-tiny`, which keep their ids, on a laptop.

    qlip train tiny-stage2 --data.train train.parquet --data.val val.parquet --out runs/tiny-stage2

TO BE MEASURED
"""

from qlip.recipes.stage2 import Stage2Recipe
from qlip.train.fit import FitConfig
from qlip.train.stage2 import Stage2Config

RECIPE = Stage2Recipe(
    tokenizer="qlip-tiny",
    task=Stage2Config(
        freeze_ids=True,
        lr=1e-4,
        adversarial_weight=0.02,
        adversary="patchgan",
        discriminator_width=256,
        ema=0.98,
    ),
    fit=FitConfig(steps=300, warmup_steps=30, eval_every=60, save_every=60),
    batch_size=32,
)
