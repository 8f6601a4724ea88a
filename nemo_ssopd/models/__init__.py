"""One record per model family, in a file of its own: see `family`."""
