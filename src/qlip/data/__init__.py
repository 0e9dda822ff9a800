"""Where samples come from, and token files."""
