"""The trainer's side: model, adapters, policy, refit, checkpoints, export, on Megatron-Core."""
