"""What the batch scripts ask of srun, for layouts that tests/slurm has no machine for: several nodes, a container.

A stand-in srun notes its arguments; it runs the config check, and ends the training step with the code it is given.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]

SRUN = """#!/usr/bin/env bash
printf '%s\\t' "$@" >>"$NOTES/srun"; echo >>"$NOTES/srun"
while [[ $1 == --* ]]; do [[ $1 == --output=* ]] && echo "0: the log" >"${1#--output=}"; shift; done
[[ $3 == nemo_ssopd.run.slurm ]] && exec "$REAL_PYTHON" "${@:2}"
exit "$STEP_CODE"
"""


def job(tmp_path: Path, *arguments: str, script: str = "train", step_code: int = 0, **variables: str) -> tuple:
    """Exit code, what the script said, the srun calls, and what scontrol was told."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": 'echo "$@" >>"$NOTES/scontrol"', "squeue": "echo N/A"}.items():
        (commands / name).write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "NOTES": str(tmp_path),
        "REAL_PYTHON": sys.executable,
        "STEP_CODE": str(step_code),
        "SSOPD_LOGS": str(tmp_path / "logs"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "32",
        **variables,
    }
    done = subprocess.run(
        ["bash", f"scripts/slurm/{script}.sbatch", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    notes = {name: tmp_path / name for name in ("srun", "scontrol")}
    calls = [line.rstrip("\t").split("\t") for line in notes["srun"].read_text().splitlines()]
    told = notes["scontrol"].read_text() if notes["scontrol"].exists() else ""
    return done.returncode, done.stdout + done.stderr, calls, told


EIGHT = ("tiny_cpu", "parallel.world_size=8", "trainer.prompts_per_step=8")


def test_two_nodes_in_a_container(tmp_path: Path) -> None:
    image = {"SSOPD_IMAGE": "/images/ssopd.sqsh", "SSOPD_MOUNTS": "/data:/data", "SSOPD_PYTHON": "python"}
    code, said, (check, step), _ = job(tmp_path, *EIGHT, **image)
    assert code == 0, said
    container = [
        "--container-image=/images/ssopd.sqsh",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
        f"--container-workdir={ROOT}",
        "--no-container-entrypoint",
    ]
    for call in (check, step):
        assert [argument for argument in call if "-container" in argument and "--output" not in argument] == container
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8"} < set(step)
    assert "--kill-on-bad-exit=1" in step and "--distribution=block:block" in step
    assert step[step.index("python") :] == ["python", "-m", "nemo_ssopd.run.launch", "--config-name", *EIGHT]


def test_bare_and_after_a_restart(tmp_path: Path) -> None:
    code, said, (_, step), _ = job(tmp_path, *EIGHT, SLURM_RESTART_COUNT="1", SSOPD_PYTHON="python")
    assert code == 0, said
    assert not any("-container-" in argument for argument in step)
    assert step[-1] == "trainer.resume=true"
    assert f"--output={tmp_path}/logs/42/restart_1.log" in step


@pytest.mark.parametrize(
    ("step_code", "code", "told"), [(75, 75, "requeue 42\n"), (143, 75, "requeue 42\n"), (1, 1, ""), (137, 137, "")]
)
def test_only_what_was_told_to_stop_is_requeued(tmp_path: Path, step_code: int, code: int, told: str) -> None:
    result = job(tmp_path, *EIGHT, step_code=step_code)
    assert (result[0], result[3]) == (code, told)


def test_processes_that_nodes_cannot_share_are_refused(tmp_path: Path) -> None:
    code, said, calls, _ = job(tmp_path, "tiny_cpu", SLURM_JOB_NUM_NODES="3")
    assert code == 1 and len(calls) == 1
    assert "error: parallel.world_size=2 is not a multiple of the job's 3 nodes" in said


def test_models_are_evaluated_one_after_the_other_on_every_gpu(tmp_path: Path) -> None:
    model = ROOT / "assets" / "demo_model"
    code, said, (_, *steps), _ = job(
        *(tmp_path, "eval_demo", f"model={{a: {model}, b: {model}}}", "parallel.world_size=0"),
        script="evaluate",
        SLURM_GPUS_ON_NODE="4",
    )
    assert code == 0, said
    assert [step[-1] for step in steps] == ["only='a'", "only='b'"]
    assert all("--ntasks=8" in step for step in steps)
