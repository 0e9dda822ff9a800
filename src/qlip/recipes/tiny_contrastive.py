"""`tiny-contrastive`: `tiny` without reconstruction, the baseline that only learns from captions (a CLIP).

The command of `tiny` with this name and another --out. Every image is encoded whole. Quantizer and decoder keep
their random weights. Run for 600 steps with AdamW and no teacher (`benchmarks/paper_tiny.py`, its cell 1:0): 4.5%
of 200 classes, where 600 steps of both losses give 6.7% (docs/results/paper_tiny.md). All steps have not been run.
"""

from dataclasses import replace

from qlip.recipes.tiny import RECIPE as TINY

RECIPE = replace(
    TINY,
    task=replace(
        TINY.task,
        reconstruction_weight=0.0,
        quantizer_weight=0.0,
        commitment_weight=0.0,
        reconstruct_every=1,
        drop_tokens=0.0,
    ),
    fit=replace(TINY.fit, best="top1"),
)
