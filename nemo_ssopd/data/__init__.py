"""Data: problems on disk, rendered to tokens and packed into micro-batches."""
