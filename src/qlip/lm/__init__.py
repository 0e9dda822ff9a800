"""The language model under text-to-image and UM3: transformer, checkpoints, chunked loss, generation."""
