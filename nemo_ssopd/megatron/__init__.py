"""The trainer's side, on Megatron-Core: layout, model, adapters, weights, policy, refit."""
