"""The name that `MegatronPolicy` had before."""

from nemo_ssopd.megatron.policy import MegatronPolicy as MegatronGRPOActor  # noqa: F401
