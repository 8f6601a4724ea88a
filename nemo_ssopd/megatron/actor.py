"""The old name of `MegatronPolicy`, still importable."""

from nemo_ssopd.megatron.policy import MegatronPolicy as MegatronGRPOActor  # noqa: F401
