"""Convert between checkpoints and the formats of Hugging Face, PEFT and Megatron-Bridge."""
