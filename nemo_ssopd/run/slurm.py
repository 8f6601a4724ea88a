"""Print what a SLURM batch script needs to know about a config before it starts processes.

    python -m nemo_ssopd.run.slurm train|evaluate NODES CONFIG [KEY=VALUE ...]

Checks the config, so that an error is one line instead of one from every process. Prints one line for each `srun`:
the number of processes, and an extra override for them if they need one.
"""

from __future__ import annotations

import os
import sys

import torch
from hydra.errors import HydraException

from nemo_ssopd.config import evaluation
from nemo_ssopd.config import run as training
from nemo_ssopd.config.compose import CONF, compose_in


def main(kind: str, nodes: int, name: str, *overrides: str) -> None:
    try:
        for line in steps(kind, nodes, name, *overrides):
            print(line)
    except (ValueError, HydraException) as error:
        sys.exit(f"error: {error}")


def steps(kind: str, nodes: int, name: str, *overrides: str) -> list[str]:
    """Return one line for each srun; ValueError when the config is wrong or does not fit the nodes."""
    composed = compose_in(CONF if kind == "train" else CONF / "eval", name, overrides)
    if kind == "train":
        parallel = training.from_hydra(composed).parallel
        return [str(spread(parallel.world_size, nodes))]
    if composed.parallel.world_size == 0:
        composed.parallel.world_size = nodes * max(1, gpus_on_this_node())
    config = evaluation.from_hydra(composed)
    tasks = spread(config.parallel.world_size, nodes)
    # The processes of an engine that has ended cannot serve another model: each model gets its own.
    return [f"{tasks} only='{model}'" for model in config.models]


def spread(world_size: int, nodes: int) -> int:
    if world_size % nodes:
        raise ValueError(
            f"parallel.world_size={world_size} is not a multiple of the job's {nodes} nodes: set it to the number of "
            f"GPUs of all nodes together, or change --nodes"
        )
    return world_size


def gpus_on_this_node() -> int:
    return int(os.environ.get("SLURM_GPUS_ON_NODE", torch.cuda.device_count()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *sys.argv[4:])
