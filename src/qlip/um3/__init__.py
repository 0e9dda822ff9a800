"""UM3: one language model for text, for pictures after text, and for text after pictures (docs/um3.md)."""
