"""The command line: compose and check the config, then run it in this process or start the workers that will.

    python scripts/train_ssopd.py --config-name tiny_cpu trainer.max_steps=5

Under torchrun or srun this is one of the workers already. From a plain shell it becomes torchrun on this node.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

# Megatron-Core warns at import of every fused kernel that it does without; on CPU that is all of them.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from nemo_ssopd.config import CONF, Config, ParallelConfig, from_hydra  # noqa: E402
from nemo_ssopd.data.loading import load_data  # noqa: E402


@hydra_runner(config_path=str(CONF), config_name="tiny_cpu")
def main(composed: DictConfig) -> None:
    """Console entry `nemo-ssopd-train`."""
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        config = from_hydra(composed)
        prepare_run_dir(config)
        if not under_launcher():
            load_data(config)  # for its errors: one clear message here, rather than one from every worker
            command = torchrun(config.parallel, "nemo_ssopd.launch")
            os.execv(command[0], command)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from nemo_ssopd.train import train  # noqa: PLC0415 -- Megatron-Core and vLLM, which checking a config can do without

    train(config)


def under_launcher() -> bool:
    """Whether torchrun, or srun with several tasks, started this process."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def prepare_run_dir(config: Config) -> None:
    """Refuse to write over another run. Workers check too: none writes before all have joined the process group."""
    run_dir = Path(config.run_dir)
    holds_a_run = (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()
    if holds_a_run and not config.trainer.resume:
        raise ValueError(
            f"run_dir={config.run_dir!r} holds a run: give another run_dir, or continue it with trainer.resume=true"
        )
    make_run_dir(config.run_dir)


def make_run_dir(run_dir: str) -> None:
    """The folder, for its owner's eyes only."""
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir!r} cannot be made ({error.strerror}): give a folder to write to") from error


def torchrun(parallel: ParallelConfig, module: str) -> list[str]:
    """The command for parallel.world_size workers on this node, each of which runs `module` with our command line."""
    os.environ.setdefault("OMP_NUM_THREADS", str(parallel.threads))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    sys.stdout.flush()
    return [*launcher, f"--nproc-per-node={parallel.world_size}", "--module", module, *sys.argv[1:]]


if __name__ == "__main__":
    main()
