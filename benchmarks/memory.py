"""The memory plan against what CPU runs really take: python benchmarks/memory.py  # writes into docs/benchmarks.md

For each run it starts the config's processes, builds the policy and the engine, refits it, trains on a full
micro-batch of sequences of the longest length the config allows, and compares rank 0's resident set with
`tools.memory_plan`. Peaks are the kernel's own (VmHWM, reset before each stage). Needs Linux, and what
scripts/prepare_smollm2.py makes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
MIB = 2**20
RUNS = (
    ["tiny_cpu"],
    ["tiny_cpu_full"],
    ["smollm2_135m_cpu"],
    ["smollm2_135m_cpu", "model.recompute=false"],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="measure this config alone, and print instead of writing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with --only")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.only, arguments.overrides)
        return
    runs = [[arguments.only, *arguments.overrides]] if arguments.only else RUNS
    text = "\n".join(["## Memory\n", "`python benchmarks/memory.py`: " + NOTE, *HEADER, *map(measured_rows, runs)])
    if arguments.only:
        print(text)
    else:
        write_section(text)


NOTE = (
    "MiB of rank 0, predicted by `tools/memory_plan.py` and measured as growth of the\nresident set over the stage "
    "before (peaks: above what stays). About 9 MiB\n"
    "of every build and 120 MiB of every first update, which loads Numba's compiler, are not tensors."
)
HEADER = ("\n| run | stage | predicted | measured | measured / predicted |", "|---|---|---|---|---|")


def measured_rows(run: list[str]) -> str:
    """Table lines of one run, measured in processes of its own."""
    sys.path.insert(0, str(ROOT))
    from nemo_ssopd.config.compose import as_dataclasses, compose_run  # noqa: PLC0415 -- the parent needs nothing heavier

    name, *overrides = run
    processes = as_dataclasses(compose_run(name, overrides)).parallel.world_size
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, __file__, "--worker", "--only", name, *overrides]
    # Tensors of 64 KiB and more go back to the kernel when they are freed, so that what is resident is what is alive.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **allocator, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    stages = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    lines = []
    for stage, (predicted, measured) in stages.items():
        ratio = f"{measured / predicted:.2f}" if predicted else ""
        expected = f"{predicted / MIB:.1f}" if predicted else "not modelled"
        lines.append(f"| `{' '.join(run)}` | {stage} | {expected} | {measured / MIB:.1f} | {ratio} |")
    return "\n".join(lines)


def worker(name: str, overrides: list[str]) -> None:
    """One rank. Rank 0 prints {stage: [predicted bytes, measured bytes]}."""
    from nemo_ssopd.algo.grpo import RatioClip  # noqa: PLC0415
    from nemo_ssopd.algo.losses import Distillation, grpo_loss  # noqa: PLC0415
    from nemo_ssopd.config.compose import as_dataclasses, compose_run  # noqa: PLC0415
    from nemo_ssopd.config.run import context_length, engine_tensor  # noqa: PLC0415
    from nemo_ssopd.megatron.policy import MegatronPolicy  # noqa: PLC0415
    from nemo_ssopd.megatron.runtime import initialize  # noqa: PLC0415
    from nemo_ssopd.models.family import read_hf_config  # noqa: PLC0415
    from nemo_ssopd.rollout.engine import RolloutEngine  # noqa: PLC0415
    from nemo_ssopd.teacher import read_by_teacher  # noqa: PLC0415
    from nemo_ssopd.types import TeacherContext, TokenSequence  # noqa: PLC0415
    from tools.memory_plan import Machine, plan  # noqa: PLC0415

    config = as_dataclasses(compose_run(name, overrides))
    hf = read_hf_config(config.model.path)
    phases = plan(config, hf, Machine(on_cuda=False)).phases
    runtime = initialize(config.parallel, seed=1)
    update, stages = phases["update"], {}
    start = resident()

    actor = MegatronPolicy(config, hf, runtime, pad_id=0)
    built = ("parameters", "adapters", "initial weights", "gradients")
    stages["weights and gradients"] = sum(update.get(row, 0) for row in built), resident() - start

    length = context_length(config)
    before = resident()
    engine = RolloutEngine(
        config.model.path,
        replace(config.engine, tensor=engine_tensor(config)),
        dtype=config.model.dtype,
        max_model_len=length,
        seed=1,
    )
    engine.load_weights(actor.weights(), policy_version=1)
    rollout = phases["rollout"]
    stages["engine"] = rollout["engine weights"] + rollout["KV cache"], resident() - before
    refit = peak(lambda: engine.load_weights(actor.weights(), policy_version=2))
    stages["refit, peak"] = phases["refit"]["refit buffers"], refit

    examples = full_batch(config, hf.vocab_size, seed=runtime.layout.data.rank)
    first, *others = examples
    read = TokenSequence(first.sequence.tokens[: config.rollout.max_prompt_tokens + config.algorithm.prefix_tokens], 1)
    K = min(config.algorithm.prefix_tokens, read.completion_length)
    read = TokenSequence(read.tokens[: 1 + K], 1)
    examples = read_by_teacher([replace(first, teacher=TeacherContext(read, 0.25)), *others], actor)
    aux = Distillation(
        kl_clip=config.algorithm.kl_clip,
        temperature=config.rollout.temperature,
        chunk_tokens=config.trainer.chunk_tokens,
        vocab_size=hf.vocab_size,
        group=runtime.layout.tensor.group,
    )
    loss = partial(grpo_loss, clip=RatioClip(0.2, 0.2), reference_kl=0.0)
    before = resident()
    actor.update(examples, loss, [aux])
    stages["optimizer"] = update["optimizer"], resident() - before
    stages["update, peak"] = update["activations"], peak(lambda: actor.update(examples, loss, [aux]))
    if runtime.is_main:
        print(json.dumps({"imports and process groups": (0, start), **stages}), flush=True)
    engine.close()


def full_batch(config: Any, vocab_size: int, *, seed: int) -> Any:
    """Sequences of full length that fill one micro-batch's token budget."""
    import torch  # noqa: PLC0415

    from nemo_ssopd.config.run import context_length  # noqa: PLC0415
    from nemo_ssopd.types import TokenSequence, TrainExample  # noqa: PLC0415

    length = context_length(config)
    whole, rest = divmod(max(config.trainer.token_budget, length), length)
    lengths = [length] * whole + [rest] * (rest > 0)
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    sequences = tuple(
        TokenSequence(tuple(part.tolist()), min(config.rollout.max_prompt_tokens, len(part)))
        for part in tokens.split(lengths)
    )
    return [TrainExample(s, (1.0,) * s.completion_length, group=0, advantage=1.0) for s in sequences]


def resident() -> int:
    return _status("VmRSS")


def peak(run: Callable[[], object]) -> int:
    """The most that the process held during `run`, above what it held before."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def write_section(text: str) -> None:
    """Replaces what stands between our marks, or appends it."""
    start, end = "<!-- memory:start -->", "<!-- memory:end -->"
    before, _, rest = PAGE.read_text().partition(start)
    PAGE.write_text(f"{before.rstrip()}\n\n{start}\n{text}\n{end}\n{rest.partition(end)[2].lstrip()}")


if __name__ == "__main__":
    main()
