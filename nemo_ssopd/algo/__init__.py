"""The algorithm in plain torch: advantages, selection, losses. It uses no Megatron, no vLLM and no files."""
