"""The command line of evaluations: compose and check the config, then run the workers of one model after the other.

    python scripts/evaluate.py --config-name eval_math model=PATH data=problems.jsonl

Under torchrun or srun, this process is already a worker, and evaluates one model. Models do not share a process, since
an engine cannot be shut down without its process groups.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_ssopd.config.compose import CONF
from nemo_ssopd.config.evaluation import EvalConfig, from_hydra
from nemo_ssopd.config.renamed import with_present_names
from nemo_ssopd.evaluation.data import EvalData, load_sets
from nemo_ssopd.evaluation.models import ModelSource, find_model
from nemo_ssopd.evaluation.results import check_folder, check_identity, has_begun, set_folder
from nemo_ssopd.rollout.graders import check_grader
from nemo_ssopd.run.signals import die_of_stop_requests
from nemo_ssopd.run.workers import make_run_dir, run_workers, under_launcher


def main() -> None:
    """Run the command `nemo-ssopd-evaluate`. A stop signal ends it at once, since each batch is already on disk."""
    die_of_stop_requests()
    arguments = ["resume=true" if argument == "--resume" else argument for argument in sys.argv[1:]]
    sys.argv[1:] = with_present_names(arguments)
    run_main()


@hydra_runner(config_path=str(CONF / "eval"), config_name="eval_math")
def run_main(composed: DictConfig) -> None:
    try:
        config = from_hydra(composed)
        check_everything(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not under_launcher():
        for name in config.models:
            start_workers(config, name)
        return
    from nemo_ssopd.checkpoint.storage import CheckpointError  # noqa: PLC0415
    from nemo_ssopd.evaluation.run import run  # noqa: PLC0415 -- Megatron-Core and vLLM: the checks do not need them

    try:
        run(config)
    except (ValueError, CheckpointError) as error:
        traceback.print_exc()
        sys.exit(f"error: {error}")


def check_everything(config: EvalConfig) -> None:
    """Check all that can be checked before an engine starts: sets, models, grader, and that no file is overwritten.

    ValueError, in one line, for the first failure. Creates the run_dir.
    """
    if under_launcher() and len(config.models) > 1:
        raise ValueError(
            f"model names {len(config.models)} models: under torchrun or srun take one at a time with "
            f"only=NAME ({', '.join(config.models)}), or start this command without a launcher"
        )
    for name, path in config.models.items():
        folders = {chosen: set_folder(config, name, chosen) for chosen in config.chosen_sets}
        for folder in folders.values():
            check_folder(folder, resume=config.resume)
        if not under_launcher():
            source = find_model(path, base=config.base)
            data = load_sets(config, source.architecture)
            if any(map(has_begun, folders.values())):
                check_continues(config, source, data, folders)
    if not under_launcher():
        check_grader(config)
    make_run_dir(config.run_dir)


def check_continues(config: EvalConfig, source: ModelSource, data: EvalData, folders: dict[str, Path]) -> None:
    """Refuse to continue an evaluation with another model, other problems or another sampling."""
    from nemo_ssopd.evaluation.identity import identities  # noqa: PLC0415 -- imports Megatron-Core: only if needed

    for chosen, now in identities(config, source, data).items():
        if has_begun(folders[chosen]):
            check_identity(folders[chosen], now)


def start_workers(config: EvalConfig, name: str) -> None:
    """Evaluate one model in workers on this node. If they fail, exit with their exit code."""
    ending = run_workers(config.parallel, "nemo_ssopd.evaluation.launch", [*sys.argv[1:], f"only='{name}'"])
    if ending.signal is not None:
        print(
            f"error: rank {ending.rank} was ended by {ending.signal.name} while {name} was evaluated. "
            f"What is written is kept: go on with --resume",
            file=sys.stderr,
        )
    if ending.code:
        sys.exit(ending.code)


if __name__ == "__main__":
    main()
