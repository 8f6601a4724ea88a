"""Avg@n, pass@k and maj@k of a finished model (scripts/evaluate.py), and of the policy during training."""
