r"""`tiny`: a tokenizer for 64-pixel images that a laptop trains in an hour or two.

    qlip train tiny --data.train tiny-imagenet/train registry/train --data.val tiny-imagenet/val \
        --data.classes classes.json --out runs/tiny

7.8 M parameters, 64 tokens of 28 bits an image, 2,400 steps of 128 samples: 307,200 images, 3.3 passes over the
69,000 Tiny-ImageNet photographs and the 22,824 drawings of `examples/registry_data` that `qlip-tiny` was trained
on, an hour and a half on two CPU cores. Expect 21.1 dB PSNR and 17% top-1 of 200 classes (`results.json` of the
bundled model). Weights follow the paper's rule (docs/paper.md section 2): α_r / α_a ≈ L_align(∞) / L_mse(∞),
about 3 / 0.01 in so short a run.
"""

from qlip.model.config import PRESETS
from qlip.recipes.stage1 import Recipe
from qlip.train.fit import FitConfig
from qlip.train.stage1 import Stage1Config

RECIPE = Recipe(
    model=PRESETS["tiny"],
    task=Stage1Config(lr=1e-3, eps=1e-8, reconstruction_weight=300.0),
    fit=FitConfig(steps=2400, warmup_steps=200, eval_every=600, save_every=200),
    batch_size=128,
    compile=True,
)
