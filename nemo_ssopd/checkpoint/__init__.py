"""Checkpoints: written, sealed, checked, read."""
