"""`tiny-reconstruction`: `tiny` without words, the baseline that only rebuilds (a BSQ autoencoder).

The command of `tiny` with this name and another --out. As long as `tiny`; its text tower stands still.
"""

from dataclasses import replace

from qlip.recipes.tiny import RECIPE as TINY

RECIPE = replace(TINY, task=replace(TINY.task, alignment_weight=0.0))
