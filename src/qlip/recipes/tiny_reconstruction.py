"""`tiny-reconstruction`: `tiny` without words, the baseline that only rebuilds (a BSQ autoencoder).

The command of `tiny` with this name and another --out. As long as `tiny`; its text tower stands still. Run for
600 steps and at α_r = 10³ (`benchmarks/paper_tiny.py`, its cell 0:1): 20.29 dB, where both losses give 20.27, and
classes at chance (docs/results/paper_tiny.md). The whole 2,400 have not been run.
"""

from dataclasses import replace

from qlip.recipes.tiny import RECIPE as TINY

RECIPE = replace(TINY, task=replace(TINY.task, alignment_weight=0.0))
