"""Metrics and protocols: from a model and samples to named numbers."""
