"""Rollouts: the inference engine that samples completions, and the verifier that rewards them."""
