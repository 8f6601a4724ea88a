"""Between checkpoints and Hugging Face, PEFT and Megatron-Bridge."""
