"""Vocab-parallel losses and log-probabilities: torch on CPU, Triton on CUDA, process groups as arguments."""
