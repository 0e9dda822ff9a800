r"""`tiny`: a tokenizer for 64-pixel images that a laptop trains in half a day.

    qlip features tiny-imagenet/train --vision resnet50-128 --out teacher.safetensors --compile
    qlip train tiny --data.train tiny-imagenet/train registry/train --data.val tiny-imagenet/val \
        --data.classes classes.json --teacher teacher.safetensors --out runs/tiny

7.8 M parameters, 64 tokens of 28 bits an image, 4,000 steps of 256 samples: 1,024,000 images, or 9.4 passes over
the 69,000 Tiny-ImageNet photographs and the 40,507 drawings of `examples/registry_data`. That takes 12 hours of
one core of an Intel Xeon at 2 GHz (Skylake), where a step takes 10.5 s beside other processes.

Muon, a teacher (`examples/resnet50.py`), reconstructing every second image, and dropping half of the patches of
the others give more in equal time than none of them: docs/results/tiny-recipes.md. The weights follow the paper's
rule (docs/paper.md section 2): α_r / α_a ≈ L_align(∞) / L_mse(∞), about 3 / 0.01 in so short a run.
"""

from qlip.model.config import PRESETS
from qlip.recipes.stage1 import Recipe
from qlip.train.fit import FitConfig
from qlip.train.stage1 import Stage1Config

RECIPE = Recipe(
    model=PRESETS["tiny"],
    task=Stage1Config(
        optimizer="muon",
        lr=2e-3,
        eps=1e-8,
        reconstruction_weight=300.0,
        teacher_weight=5.0,
        reconstruct_every=2,
        drop_tokens=0.5,
    ),
    fit=FitConfig(steps=4000, warmup_steps=200, eval_every=200, save_every=60),
    batch_size=256,
    compile=True,
)
