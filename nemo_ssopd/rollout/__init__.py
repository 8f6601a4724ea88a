"""Rollouts: the inference engine that samples completions, and the graders that reward them."""
