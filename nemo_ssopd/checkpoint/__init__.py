"""Write, seal, check and read checkpoints."""
