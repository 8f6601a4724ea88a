"""The training command: compose and check the config, then train in this process or start workers that do.

    python scripts/train_ssopd.py --config-name tiny_cpu trainer.max_steps=5

Under torchrun or srun this process is already one of the workers. From a plain shell it starts the workers of this
node. Exit codes: 0 finished, 75 stopped on request and saved, anything else failed.
"""

from __future__ import annotations

from nemo_ssopd.run.signals import EXIT_STOPPED, ignore_stop_requests, note_stop_requests, received

note_stop_requests()  # first: the imports below take seconds

import logging  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

# At import, Megatron-Core warns about each fused kernel that is missing. On CPU that is all of them.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from nemo_ssopd.config.compose import CONF  # noqa: E402
from nemo_ssopd.config.plugin import load_function  # noqa: E402
from nemo_ssopd.config.renamed import with_present_names  # noqa: E402
from nemo_ssopd.config.run import Config, from_hydra  # noqa: E402
from nemo_ssopd.data.loading import load_data  # noqa: E402
from nemo_ssopd.rollout.graders import check_grader  # noqa: E402
from nemo_ssopd.run.watchdog import last_seen  # noqa: E402
from nemo_ssopd.run.workers import make_run_dir, run_workers, under_launcher  # noqa: E402


def main() -> None:
    """Run the console entry `nemo-ssopd-train`."""
    sys.argv[1:] = with_present_names(sys.argv[1:])
    _main()


@hydra_runner(config_path=str(CONF), config_name="tiny_cpu")
def _main(composed: DictConfig) -> None:
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        config = from_hydra(composed)
        prepare_run_dir(config)
        if not under_launcher():
            # Called for their errors: one clear message here instead of one from every worker.
            load_data(config)
            check_grader(config)
            for name in config.algorithm.aux_losses:
                load_function("algorithm.aux_losses", name)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if under_launcher():
        from nemo_ssopd.train import train  # noqa: PLC0415 -- Megatron-Core and vLLM; checking a config needs neither

        code = train(config)
    else:
        code = start(config)
    ignore_stop_requests()
    sys.exit(code)


def start(config: Config) -> int:
    """Run the workers and return their exit code. Print an error line when a signal killed one."""
    if received:
        return EXIT_STOPPED
    sys.stdout.flush()
    ending = run_workers(config.parallel, "nemo_ssopd.run.launch", sys.argv[1:])
    if ending.signal is not None:
        print(
            f"error: rank {ending.rank} was killed by {ending.signal.name}{last_seen(config.run_dir, ending.rank)}, "
            f"and the other ranks were ended. Checkpoints are whole: go on with trainer.resume=true",
            file=sys.stderr,
        )
    return ending.code


def prepare_run_dir(config: Config) -> None:
    """Create the run directory; ValueError when it holds a run and trainer.resume is off.

    Workers check this too: none of them writes before all have joined the process group.
    """
    run_dir = Path(config.run_dir)
    holds_a_run = (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()
    if holds_a_run and not config.trainer.resume:
        raise ValueError(
            f"run_dir={config.run_dir!r} holds a run: give another run_dir, or continue it with trainer.resume=true"
        )
    make_run_dir(config.run_dir)


if __name__ == "__main__":
    main()
