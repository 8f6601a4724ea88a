"""The batch scripts on a real SLURM of one node: warned, preempted, failing; training ends as if nothing had been."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster, until

ROOT = Path(__file__).parents[2]
TRAIN, EVALUATE = "scripts/slurm/train.sbatch", "scripts/slurm/evaluate.sbatch"
STEPS = 16
RUN_S = 400  # generous, for a busy machine: nothing is asserted about time
VOLATILE = ("time/", "memory/", "progress/tokens_per_second")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        started.environment |= {
            "SSOPD_PYTHON": sys.executable,
            "SSOPD_LOGS": str(started.folder / "logs"),
            "PYTHONPATH": str(ROOT),
        }
        yield started


def submit(cluster: Cluster, script: str, *arguments: str) -> int:
    return cluster.submit(script, *arguments, output=cluster.folder / "%j.out", chdir=ROOT)


def said(cluster: Cluster, job: int) -> str:
    """By the batch script."""
    return (cluster.folder / f"{job}.out").read_text()


def log(cluster: Cluster, job: int, restart: int) -> str:
    file = cluster.folder / "logs" / str(job) / f"restart_{restart}.log"
    return file.read_text() if file.exists() else ""


def training(run_dir: Path) -> tuple[str, ...]:
    return (
        *("tiny_cpu", f"run_dir={run_dir}", f"trainer.max_steps={STEPS}", "trainer.save_every=5"),
        *("trainer.eval_at_ends=true", "trainer.eval_every=0", "evaluation.samples=1", "logging.tensorboard=false"),
    )


def metrics(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(VOLATILE)} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    job = submit(cluster, TRAIN, *training(run_dir))
    cluster.wait(job, "COMPLETED", timeout_s=RUN_S)
    assert cluster.job(job)["Restarts"] == "0"
    assert [row["step"] for row in metrics(run_dir)] == list(range(STEPS + 1))
    return run_dir


def test_a_run_that_is_warned_and_then_preempted_ends_as_an_undisturbed_one(
    cluster: Cluster, undisturbed: Path
) -> None:
    run_dir = undisturbed.with_name("disturbed")
    job = submit(cluster, TRAIN, *training(run_dir))

    until(lambda: f"step 2/{STEPS}" in log(cluster, job, 0), RUN_S, "the run did not begin")
    cluster.run("scancel", "--signal=USR1", str(job))  # what --signal sends before the time limit
    until(lambda: f"/{STEPS}" in log(cluster, job, 1), RUN_S, "the run did not go on")
    assert "stopped after step" in log(cluster, job, 0) and "SIGUSR1 came" in log(cluster, job, 0)

    urgent = cluster.submit("tests/slurm/urgent.sbatch", partition="urgent", chdir=ROOT, output="/dev/null")
    cluster.wait(urgent, "COMPLETED", timeout_s=RUN_S)
    assert "stopped after step" in log(cluster, job, 1) and "SIGTERM came" in log(cluster, job, 1)

    cluster.wait(job, "COMPLETED", timeout_s=RUN_S)
    fields = cluster.job(job)
    assert (fields["Restarts"], fields["ExitCode"]) == ("2", "0:0")
    assert "finished" in said(cluster, job)
    assert metrics(run_dir) == metrics(undisturbed)
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (run_dir, undisturbed))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_an_evaluation_that_is_warned_goes_on(cluster: Cluster, undisturbed: Path) -> None:
    run_dir = undisturbed.with_name("evaluation")
    job = submit(
        *(cluster, EVALUATE, "eval_demo", f"model={undisturbed}", f"run_dir={run_dir}"),
        *("evaluation.samples=1", "batch=4", "parallel.world_size=2"),
    )
    samples = run_dir / "undisturbed" / "products" / "samples.jsonl"

    def has_begun() -> bool:
        assert cluster.job(job)["JobState"] != "FAILED", said(cluster, job) + log(cluster, job, 0)
        return samples.exists() and samples.stat().st_size > 0

    until(has_begun, RUN_S, "nothing was evaluated")
    cluster.run("scancel", "--signal=USR1", str(job))
    cluster.wait(job, "COMPLETED", timeout_s=RUN_S)
    assert cluster.job(job)["Restarts"] == "1"
    assert samples.read_text() == (undisturbed / "eval" / f"step_{STEPS:06}.jsonl").read_text()


def test_a_bad_config_fails_with_one_line_and_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, TRAIN, "tiny_cpu", f"run_dir={tmp_path / 'run'}", "rollout.group_size=1")
    cluster.wait(job, "FAILED", timeout_s=RUN_S)
    fields = cluster.job(job)
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "1:0")
    assert said(cluster, job).count("error: rollout.group_size=1: advantages compare completions") == 1


def test_a_cancelled_run_saves_and_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, TRAIN, *training(tmp_path / "run"), "data.eval=null")
    until(lambda: f"step 1/{STEPS}" in log(cluster, job, 0), RUN_S, "the run did not begin")
    cluster.run("scancel", str(job))
    until(lambda: "stopped on request" in said(cluster, job), RUN_S, "the batch script did not end")
    until(lambda: not cluster.run("squeue", "--noheader").strip(), 60, "the job did not leave the queue")
    assert cluster.job(job)["JobState"] == "CANCELLED"
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"iter_{step:07}").is_dir()


def test_no_process_of_a_job_is_left(cluster: Cluster) -> None:
    """The last test of this file: by now every job is over."""
    until(lambda: not processes_under(cluster.folder.parent), 30, "processes of jobs were left")


def processes_under(folder: Path) -> list[int]:
    """Those whose command line names a run below the test's own folder."""
    return [process.pid for process in psutil.process_iter(["cmdline"]) if f"run_dir={folder}" in joined(process)]


def joined(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())
