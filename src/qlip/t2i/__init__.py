"""Text to image: a language model that learns the tokens of pictures after a text (docs/t2i.md)."""
