"""`tiny-contrastive`: `tiny` without pictures coming back, the baseline that only reads words (a CLIP).

The command of `tiny` with this name and another --out. Half as long as `tiny`, for nothing is decoded; quantizer
and decoder stand still at their random start.
"""

from dataclasses import replace

from qlip.recipes.tiny import RECIPE as TINY

RECIPE = replace(
    TINY,
    task=replace(TINY.task, reconstruction_weight=0.0, quantizer_weight=0.0, commitment_weight=0.0),
    fit=replace(TINY.fit, best="top1"),
)
