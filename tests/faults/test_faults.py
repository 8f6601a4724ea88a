"""Each fault of docs/reliability.md, on real runs: the same trajectory in the end, or one clear message in time.

Moments are random; a failure prints the seed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nemo_ssopd.run.signals import EXIT_STOPPED
from nemo_ssopd.run.watchdog import Beat, read_beat
from tests.commands import BOUND_S, Command

pytestmark = pytest.mark.heavy

GRADING = "nemo_ssopd.rollout.grading_worker"
VOLATILE = ("time/", "memory/", "progress/tokens_per_second")
STEPS = 6
SSOPD = (
    *("--config-name", "tiny_cpu", f"trainer.max_steps={STEPS}", "trainer.save_every=2", "data.eval=null"),
    "data.train='demo:products?count=200&seed=1'",
)
SFT = (  # no engine
    *("--config-name", "warmstart", "model.path=assets/demo_model", "data.train='corpus:products?count=480&seed=1'"),
    *("trainer.max_steps=100000", "trainer.save_every=0", "data.eval=null"),
)
COMMON = ("logging.tensorboard=false", "trainer.export=false")


def command(run_dir: Path, *overrides: str, fault: str | None = None) -> Command:
    main = ("-m", "tests.faults.injected") if fault else ("scripts/train_ssopd.py",)
    secrets = {"WANDB_API_KEY": "very-secret", "HF_TOKEN": "very-secret"}
    return Command(*main, *overrides, *COMMON, f"run_dir={run_dir}", **secrets, **({"FAULT": fault} if fault else {}))


def ended(command: Command, run_dir: Path) -> tuple[int, str]:
    """Exit code and output; nothing of the run is left alive, no secret is written."""
    with command:
        done = command.wait()
    deadline = time.monotonic() + 30
    while (left := orphaned_graders()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left and command.leaves_nobody(), f"left: {left}\n{done.output[-3000:]}"
    texts = [
        done.output,
        *(file.read_text() for pattern in ("*.*", "heartbeat/*") for file in run_dir.glob(pattern) if is_text(file)),
    ]
    assert not any("very-secret" in text for text in texts)
    return done.returncode, done.output


def is_text(file: Path) -> bool:
    return file.suffix in (".json", ".jsonl", ".yaml", ".html", ".traceback", ".stack")


def orphaned_graders() -> list[psutil.Process]:
    """Grading processes that lost their trainer."""
    processes = psutil.process_iter(["cmdline", "ppid"])
    return [p for p in processes if GRADING in " ".join(p.info["cmdline"] or ()) and p.info["ppid"] == 1]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(VOLATILE)} for row in rows]


def logged_steps(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def when(command: Command, run_dir: Path, rank: int, condition: Callable[[Beat], bool]) -> Beat:
    """The heartbeat of a rank, once it is so far."""
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline and command.is_running():
        beat = read_beat(run_dir, rank)
        if beat is not None and condition(beat):
            return beat
        time.sleep(0.05)
    raise AssertionError(f"rank {rank} never was there: {command.printed()[-3000:]}")


def listens(command: Command) -> bool:
    """Whether it handles SIGTERM by now."""
    caught = Path(f"/proc/{command.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def one_error(output: str) -> str:
    """The only line that says what went wrong."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output[-5000:]
    return errors[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output = ended(command(run_dir, *SSOPD), run_dir)
    assert code == 0, output[-5000:]
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, STEPS + 1))
    return run_dir


def test_killed_verifiers_and_a_clock_that_jumps_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, output = ended(command(run_dir, *SSOPD, fault="clock_and_verifiers 0 3 verify"), run_dir)
    assert code == 0, output[-5000:]
    assert metrics(run_dir) == metrics(undisturbed)


def test_killed_then_damaged_then_told_to_stop_it_still_ends_as_the_undisturbed_run(
    undisturbed: Path, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moment = random.Random(seed)
    run_dir, rank = tmp_path / "run", moment.randrange(2)

    started = command(run_dir, *SSOPD, fault="none 0 0 none")
    beat = when(started, run_dir, rank, lambda beat: logged_steps(run_dir) >= STEPS - 2)  # and the report are left
    time.sleep(moment.uniform(0, 1.5))
    os.kill(beat.pid, signal.SIGKILL)
    code, output = ended(started, run_dir)
    assert code == 128 + signal.SIGKILL
    assert f"rank {rank} was killed by SIGKILL in stage " in one_error(output)

    newest, *older = sorted((run_dir / "checkpoints").glob("iter_*"), reverse=True)
    assert older, "a checkpoint to fall back to"
    tensors = bytearray((newest / "__0_0.distcp").read_bytes())
    tensors[moment.randrange(len(tensors))] ^= 1
    (newest / "__0_0.distcp").write_bytes(tensors)

    started = command(run_dir, *SSOPD, "trainer.resume=true")
    while not listens(started):  # what comes before, ends any process
        time.sleep(0.02)
    time.sleep(moment.uniform(0, 8))
    started.send_signal(moment.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
    code, output = ended(started, run_dir)
    assert code in (EXIT_STOPPED, 0), output[-5000:]  # 0: it came too late
    assert "Traceback" not in output

    code, output = ended(command(run_dir, *SSOPD, "trainer.resume=true"), run_dir)
    assert code == 0, output[-5000:]
    assert metrics(run_dir) == metrics(undisturbed)


def test_an_engine_that_fails_on_one_rank_stops_all(tmp_path: Path) -> None:
    code, output = ended(command(tmp_path / "run", *SSOPD, fault="engine 1 2 rollout"), tmp_path / "run")
    assert code == 1
    assert one_error(output) == "error: rank 1 in stage 'rollout' of step 2: RuntimeError: the engine is gone"
    assert output.count("Traceback") == 1


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    rank = random.randrange(2)
    started = command(run_dir, *SFT, fault="none 0 0 none")
    beat = when(started, run_dir, rank, lambda beat: beat.step >= 3)
    os.kill(beat.pid, signal.SIGSTOP)
    code, output = ended(started, run_dir)
    assert code == 1
    assert f"rank {rank} (" in one_error(output) and "has been silent for" in one_error(output)


def test_a_rank_that_hangs_is_named_with_its_stage(tmp_path: Path) -> None:
    code, output = ended(command(tmp_path / "run", *SFT, fault="hang 1 3 update"), tmp_path / "run")
    assert code == 1
    error = one_error(output)
    assert "rank 1 (" in error and "in stage 'update' of step 3 for" in error and "1 other ranks wait" in error
    assert " in hang" in (tmp_path / "run" / "heartbeat" / "rank_00001.stack").read_text()


def test_a_full_disk_is_named_and_costs_one_step(tmp_path: Path) -> None:
    """/dev/full gives the very error of a full disk, to whom writes a trace of the third step."""
    run_dir = tmp_path / "run"
    full = run_dir / "profile" / "step_000003_rank_0000.json.gz"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    run_dir.chmod(0o700)
    three = (*SFT, "trainer.max_steps=3", "trainer.save_every=1", "trainer.profile_steps=[3]")
    code, output = ended(command(run_dir, *three), run_dir)
    assert code == 1
    assert "No space left on device" in one_error(output) and "Make room" in one_error(output)
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]
    full.unlink()
    code, output = ended(command(run_dir, *three, "trainer.resume=true"), run_dir)
    assert code == 0, output[-5000:]
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
