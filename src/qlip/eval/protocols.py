"""Where the protocols were until each had a file of its own."""

from qlip.eval.batches import Track
from qlip.eval.reconstruction import Distance, code_use, reconstruction
from qlip.eval.zero_shot import zero_shot

__all__ = ["Distance", "Track", "code_use", "reconstruction", "zero_shot"]
