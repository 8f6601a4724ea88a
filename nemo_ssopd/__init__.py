"""SSOPD on Megatron-Core: self-supervised on-policy distillation with vLLM rollouts and math-verify rewards."""

__version__ = "0.1.0"
