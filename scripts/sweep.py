"""Run every combination of a sweep's axes and seeds once on this machine; rerunning continues a stopped sweep.

    python scripts/sweep.py benchmarks/sweeps/products.yaml --workers 2
    python scripts/sweep.py benchmarks/sweeps/products.yaml --seeds 1 2      # fewer seeds than the file has
    python scripts/sweep.py benchmarks/sweeps/products.yaml --list           # what is done and what is not

A run's folder is run_dir/LEVEL/.../seed_N, one level of each axis in the file's order. A finished run has finished.json
and is never run again. An interrupted run continues from its newest checkpoint, or from the start. Runs of one
process are forked from this process, which has imported everything: start-up is paid once.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_ssopd.config.compose import compose_run
from nemo_ssopd.config.run import Config, from_hydra

Axes = dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Sweep:
    """The contents of a sweep file.

    >>> Sweep("recipes_cpu", "runs/products", [1, 2], {"recipe": {"grpo": ["algorithm=grpo"], "ssopd": []}})
    """

    config: str
    """NAME of the file conf/NAME.yaml that every run starts from."""
    run_dir: str
    seeds: list[int]
    """Values of trainer.seed, which decides the order of prompts and the sampling."""
    axes: Axes
    """Axis -> level -> the overrides that the level stands for."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every run."""


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    >>> Run(Path("runs/a/grpo/seed_1"), {"recipe": "grpo"}, 1, "recipes_cpu", ("algorithm=grpo", "trainer.seed=1"))
    """

    folder: Path
    levels: dict[str, str]
    seed: int
    config_name: str
    overrides: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return (self.folder / "finished.json").exists()

    @property
    def arguments(self) -> list[str]:
        return [*self.overrides, f"run_dir={self.folder}", "trainer.resume=true"]

    def config(self) -> Config:
        """Return the composed and checked config; ValueError if it cannot work."""
        return from_hydra(compose_run(self.config_name, self.arguments))


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; ValueError if it is not one."""
    try:
        values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
        sweep = Sweep(**values)
    except (OSError, TypeError) as error:
        raise ValueError(f"{path} is not a sweep ({error}): give config, run_dir, seeds and axes") from error
    if not sweep.seeds or not all(sweep.axes.values()):
        raise ValueError(f"{path}: seeds or an axis is empty; give each at least one entry")
    return sweep


def runs_of(sweep: Sweep) -> Iterator[Run]:
    """Yield the runs, seeds outermost: a sweep that stops early has all arms for every seed except the last."""
    for seed in sweep.seeds:
        for combination in itertools.product(*(axis.items() for axis in sweep.axes.values())):
            names = [str(name) for name, _ in combination]  # YAML reads 1e-4 as a number
            own = [override for _, overrides in combination for override in overrides]
            yield Run(
                folder=Path(sweep.run_dir, *names, f"seed_{seed}"),
                levels=dict(zip(sweep.axes, names, strict=True)),
                seed=seed,
                config_name=sweep.config,
                overrides=(*sweep.overrides, *own, f"trainer.seed={seed}"),
            )


def run_all(runs: list[Run], *, workers: int) -> list[Run]:
    """Run all runs in order, `workers` at a time. Return those that failed."""
    import nemo_ssopd.train  # noqa: F401, PLC0415 -- once, here, for all the runs that are forked from this process

    waiting, failed = list(reversed(runs)), []
    running: dict[int, tuple[Run, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            run = waiting.pop()
            running[start(run)] = run, time.perf_counter()
        process, status, usage = os.wait3(0)
        run, since = running.pop(process)
        seconds = time.perf_counter() - since
        if status == 0:
            write_record(run, seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime)
        else:
            failed.append(run)
        outcome = "FAILED" if status else "finished"
        print(f"{outcome} {run.folder}  {seconds:.0f} s, {len(waiting) + len(running)} to go", flush=True)
    return failed


def start(run: Run) -> int:
    """Fork the run and return its process id; its console output goes to FOLDER/console.log."""
    config = run.config()
    run.folder.mkdir(parents=True, exist_ok=True)
    if process := os.fork():
        return process
    log = os.open(run.folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    if config.parallel.world_size > 1:  # its workers are started by the training command
        script = str(Path(__file__).with_name("train_ssopd.py"))
        command = [sys.executable, script, "--config-name", run.config_name, *run.arguments]
        os.execv(command[0], command)  # noqa: S606
    train_here(config)
    os._exit(0)


def train_here(config: Config) -> None:
    """Train in this process, as the only rank of its group."""
    from nemo_ssopd.train import train  # noqa: PLC0415 -- imported already, see run_all

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    train(config)
    sys.stdout.flush()


def write_record(run: Run, *, seconds: float, cpu_seconds: float) -> None:
    """Write finished.json, the last file of a run: its levels and overrides, and its time."""
    cost = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    record = {"levels": run.levels, "seed": run.seed, "config": run.config_name, "overrides": run.overrides} | cost
    temporary = run.folder / "finished.json.tmp"
    temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    temporary.replace(run.folder / "finished.json")


def lock(folder: Path) -> None:
    """Lock a folder against other sweeps; ValueError if it is in use.

    Runs inherit the lock, so a killed sweep's folder stays locked until its last runs have ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    os.set_inheritable(file, True)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another sweep, or by its last runs: wait until they end") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the YAML file")
    parser.add_argument("--workers", type=int, default=1, help="runs at one time (default 1)")
    parser.add_argument("--seeds", type=int, nargs="+", help="these instead of the file's")
    parser.add_argument("--list", action="store_true", help="print every run and whether it is finished, and stop")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        sweep = read_sweep(arguments.sweep)
        runs = list(runs_of(replace(sweep, seeds=arguments.seeds or sweep.seeds)))
        if arguments.list:
            print("\n".join(f"{'finished' if run.finished else '-':8} {run.folder}" for run in runs))
            return
        lock(Path(sweep.run_dir))
        for run in runs[: len(runs) // len(arguments.seeds or sweep.seeds)]:  # one seed of every arm
            run.config()
    except ValueError as error:
        sys.exit(f"error: {error}")
    waiting = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} finished already", flush=True)
    if failed := run_all(waiting, workers=arguments.workers):
        sys.exit(f"error: {len(failed)} runs failed, such as {failed[0].folder}: see its console.log, then sweep again")


if __name__ == "__main__":
    main()
