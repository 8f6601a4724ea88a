"""What the steps on a model share: random weights on disk, their configs, and a batch with every loss of SSOPD."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from nemo_ssopd.algo.grpo import RatioClip
from nemo_ssopd.algo.losses import Distillation, grpo_loss
from nemo_ssopd.config.compose import as_dataclasses, compose_run
from nemo_ssopd.config.run import Config
from nemo_ssopd.types import TokenSequence

ROOT = Path(__file__).parents[2]
LOSS = partial(grpo_loss, clip=RatioClip(0.2, 0.2), reference_kl=0.0)


def random_model(folder: Path, shape: dict[str, Any], *, device: str) -> Path:
    """Write bfloat16 weights of a Qwen3 whose logits spread like a trained model's; a folder that is there is kept."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen3Config(**shape, architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Qwen3ForCausalLM(config).named_parameters()}
    generator = torch.Generator(device).manual_seed(7)
    tensors = {}
    for name, size in shapes.items():
        values = torch.randn(size, generator=generator, device=device)
        is_norm, spread = len(size) == 1, 3.0 if "embed" in name or "lm_head" in name else 1.0
        values = 1 + 0.1 * values if is_norm else values * (spread / size[-1] ** 0.5)
        tensors[name] = values.to("cpu", torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    save_file(tensors, folder / "half_written", metadata={"format": "pt"})
    (folder / "half_written").rename(folder / "model.safetensors")  # a step may be killed at any time
    return folder


def qwen3_0p6b() -> dict[str, Any]:
    """Qwen3-0.6B differs from the shipped 1.7B in these two sizes."""
    shape = json.loads((ROOT / "assets/model_shapes/Qwen3-1.7B/config.json").read_text())
    left_out = ("architectures", "model_type")
    return {key: value for key, value in shape.items() if key not in left_out} | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
    }


def one_process(name: str, overrides: Sequence[str]) -> Config:
    """A shipped config on one process, not checked: its model may have another shape than the data's tokenizer."""
    config = as_dataclasses(compose_run(name, ["parallel.world_size=1", "parallel.tensor=1", *overrides]))
    assert isinstance(config, Config)
    return config


def sequences(lengths: Sequence[int], vocab_size: int, *, seed: int) -> list[TokenSequence]:
    """Random tokens; the prompt is a third of each, but at least one token."""
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).split(
        list(lengths)
    )
    return [TokenSequence(tuple(part.tolist()), max(1, len(part) // 3)) for part in tokens]


def distillation(config: Config, actor: Any) -> Distillation:
    """Return SSOPD's auxiliary loss with the config's settings."""
    return Distillation(
        kl_clip=config.algorithm.kl_clip,
        temperature=config.rollout.temperature,
        chunk_tokens=config.trainer.chunk_tokens,
        vocab_size=actor.hf.vocab_size,
        group=actor.runtime.layout.tensor.group,
    )
