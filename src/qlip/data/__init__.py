"""Where samples come from, and token files."""

from qlip.data.token_dataset import TokenDataset

__all__ = ["TokenDataset"]
