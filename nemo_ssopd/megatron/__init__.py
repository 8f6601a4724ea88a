"""The trainer's side: model, adapters, actor, refit, checkpoints, export, on Megatron-Core."""
