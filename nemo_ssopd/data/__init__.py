"""From problems on disk to tokens in micro-batches."""
