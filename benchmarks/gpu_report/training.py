"""The training command on one device in bfloat16: some steps, a checkpoint, then more steps with the other refit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_report.stage import Results

ROOT = Path(__file__).parents[2]
STEPS = {"cuda": {"first": 6, "second": 9}, "cpu": {"first": 1, "second": 2}}
NEEDED = (
    "hydra",
    "omegaconf",
    "nemo",
    "datasets",
    "megatron",
    "vllm",
    "math_verify",
    "tensorboard",
    "matplotlib",
    "scipy",
)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(results: Results, refit: str, part: str) -> None:
    """`part` is first, or second: the same run, resumed."""
    for name in NEEDED:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    run_dir, steps = results.folder / "run", STEPS[results.device][part]
    command = [sys.executable, "scripts/train_ssopd.py", "--config-name", "tiny_cpu", f"run_dir={run_dir}"]
    command += ["parallel.world_size=1", "parallel.tensor=1", "engine.tensor=1", "model.dtype=bfloat16"]
    command += [f"rollout.refit={refit}", "engine.gpu_memory_utilization=0.2", f"trainer.max_steps={steps}"]
    command += ["trainer.eval_at_ends=false", "trainer.eval_every=0", "trainer.export=false"]
    command += [f"trainer.resume={str(part == 'second').lower()}"]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    results.check("exit code", code, 0)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    results.check("steps logged", [row["step"] for row in rows], list(range(1, steps + 1)))
    for name in ("rollout/logprob_mismatch", "optim/grad_norm", "loss/total", "reward/mean"):
        results.add(f"{name} by step", ", ".join(f"{row[name]:.3g}" for row in rows if name in row))
    for name in sorted(key for key in rows[-1] if key.startswith(("time/", "memory/"))):
        results.add(f"{name} of the last step", rows[-1][name])
    results.check("checkpoints", len(list(run_dir.glob("checkpoints/iter_*"))), 1 if part == "first" else 2)
