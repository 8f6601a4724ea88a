"""Avg@n, pass@k and maj@k: of a model on its own (scripts/evaluate.py), and of the policy while it trains."""
