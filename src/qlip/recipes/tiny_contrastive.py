"""`tiny-contrastive`: `tiny` without pictures coming back, the baseline that only reads words (a CLIP).

The command of `tiny` with this name and another --out. Half as long as `tiny`, for nothing is decoded; quantizer
and decoder stand still at their random start. Run for 600 steps (`benchmarks/paper_tiny.py`, its cell 1:0): 4.5%
of 200 classes, where 600 steps of both losses give 6.7% (docs/results/paper_tiny.md). The whole 2,400 have not
been run.
"""

from dataclasses import replace

from qlip.recipes.tiny import RECIPE as TINY

RECIPE = replace(
    TINY,
    task=replace(TINY.task, reconstruction_weight=0.0, quantizer_weight=0.0, commitment_weight=0.0),
    fit=replace(TINY.fit, best="top1"),
)
