"""The algorithm in plain torch: advantages, selection, losses. No Megatron, no vLLM, no files."""
