"""`tiny-reconstruction`: `tiny` without captions, the baseline that only reconstructs (a BSQ autoencoder).

The command of `tiny` with this name and another --out. Every image is reconstructed, so it takes longer
than `tiny`. The text tower keeps its random weights. Run for 600 steps with AdamW, no teacher and α_r = 10³
(`benchmarks/paper_tiny.py`, its cell 0:1): 20.29 dB, where both losses give 20.27, and classes at chance
(docs/results/paper_tiny.md). All steps have not been run.
"""

from dataclasses import replace

from qlip.recipes.tiny import RECIPE as TINY

RECIPE = replace(TINY, task=replace(TINY.task, alignment_weight=0.0, reconstruct_every=1, drop_tokens=0.0))
