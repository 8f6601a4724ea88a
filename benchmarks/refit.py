"""Both ways to refit the engine: time, and log-probs against the trainer's. Writes into docs/benchmarks.md.

    python benchmarks/refit.py                                             # the demo model, on CPU
    python benchmarks/refit.py --model models/SmolLM2-135M-Instruct

One process and one engine for each mode and type of the weights. The adapters have random B, so that a refit that did
not arrive shows: then the difference would be that to the base model, which stands in the last column.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_ssopd.config.compose import compose_run
from nemo_ssopd.config.run import context_length, from_hydra

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
MODES, DTYPES = ("merged", "adapter"), ("float32", "bfloat16")
PROMPTS, PROMPT_TOKENS, REFITS = 16, 16, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["assets/demo_model"])
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "DTYPE", "MODE"), help=argparse.SUPPRESS)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(*arguments.worker)))
        return
    rows = [measured(model, dtype, mode) for model in arguments.model for dtype in DTYPES for mode in MODES]
    text = table(rows, " ".join(arguments.model))
    print(text)
    if not arguments.no_write:
        write_section(text)


def measured(model: str, dtype: str, mode: str) -> dict[str, Any]:
    """A row, from a process of its own."""
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, __file__, "--worker", model, dtype, mode]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {"model": Path(model).name, "dtype": dtype, "mode": mode, **figures}


def worker(model: str, dtype: str, mode: str) -> dict[str, float]:
    """Median seconds of a refit, bytes that go over, and differences between log-probs of sampled tokens."""
    import torch  # noqa: PLC0415 -- the parent needs none of these

    from nemo_ssopd.megatron.lora import adapters, adapters_disabled  # noqa: PLC0415
    from nemo_ssopd.megatron.policy import MegatronPolicy  # noqa: PLC0415
    from nemo_ssopd.megatron.refit import refit  # noqa: PLC0415
    from nemo_ssopd.megatron.runtime import initialize  # noqa: PLC0415
    from nemo_ssopd.megatron.weights import peft_weights  # noqa: PLC0415
    from nemo_ssopd.models.family import read_hf_config  # noqa: PLC0415
    from nemo_ssopd.rollout.engine import RolloutEngine  # noqa: PLC0415
    from nemo_ssopd.types import TokenSequence  # noqa: PLC0415

    layout = ["parallel.world_size=1", "parallel.tensor=1", f"model.path={model}", f"model.dtype={dtype}"]
    config = from_hydra(compose_run("tiny_cpu", [*layout, f"rollout.refit={mode}"]))
    hf = read_hf_config(model)
    runtime = initialize(config.parallel, seed=1)
    actor = MegatronPolicy(config, hf, runtime, pad_id=0)
    engine = RolloutEngine(
        model,
        replace(config.engine, tensor=1, max_sequences=PROMPTS),
        dtype=dtype,
        max_model_len=context_length(config),
        seed=1,
        lora_rank=config.lora.rank if mode == "adapter" else 0,
    )
    generator, seconds = torch.Generator().manual_seed(1), []
    for version in range(1, REFITS + 1):
        with torch.no_grad():
            for adapter in adapters(actor.model):
                adapter.B.copy_(0.02 * torch.randn(adapter.B.shape, generator=generator))
        start = time.perf_counter()
        refit(actor, engine, config, policy_version=version)
        seconds.append(time.perf_counter() - start)
    prompts = torch.randint(hf.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    completions = engine.generate(
        [tuple(prompt) for prompt in prompts],
        seeds=list(range(PROMPTS)),
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=(),
    )
    sequences = [TokenSequence((*p, *c.tokens), PROMPT_TOKENS) for p, c in zip(prompts, completions, strict=True)]
    sampled = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    trained = torch.cat(actor.logprobs(sequences)).float()
    with adapters_disabled(actor.model):
        base = torch.cat(actor.logprobs(sequences)).float()
    sent = actor.weights() if mode == "merged" else peft_weights(actor.model, runtime)
    figures = {
        "seconds": statistics.median(seconds[1:]),
        "mib": sum(tensor.nbytes for _, tensor in sent) / 2**20,
        "mean": float((sampled - trained).abs().mean()),
        "largest": float((sampled - trained).abs().max()),
        "from_base": float((base - trained).abs().mean()),
    }
    engine.close()
    return figures


def table(rows: list[dict[str, Any]], models: str) -> str:
    lines = [
        "## Refit",
        "",
        f"`python benchmarks/refit.py --model {models}`:",
        f"CPU, one process, LoRA of rank 16 on all projections, median of {REFITS - 1} refits; |log-prob of the engine",
        f"- of the trainer| of the tokens of {PROMPTS} completions. Not measured on a GPU.",
        "",
        "| model | weights | refit | seconds | MiB sent | mismatch, mean | largest | trainer to base, mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['mode']} | {row['seconds']:.3f} | {row['mib']:.2f} "
            f"| {row['mean']:.1e} | {row['largest']:.1e} | {row['from_base']:.1e} |"
        )
    return "\n".join(lines)


def write_section(text: str) -> None:
    """Replaces what stands between our marks, or appends it."""
    start, end = "<!-- refit:start -->", "<!-- refit:end -->"
    before, _, rest = PAGE.read_text().partition(start)
    PAGE.write_text(f"{before.rstrip()}\n\n{start}\n{text}\n{end}\n{rest.partition(end)[2].lstrip()}")


if __name__ == "__main__":
    main()
