"""Workers of one node that die, fail or are told to stop, and the folder that they write to."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from nemo_ssopd.run.workers import make_run_dir
from tests.commands import Command, run_command


@pytest.mark.heavy
@pytest.mark.parametrize(("how", "ending"), [("dies", "137 1"), ("fails", "3 1")])
def test_one_worker_that_ends_badly_ends_all(how: str, ending: str) -> None:
    assert run_command("-m", "tests.run.tiny_workers", how).stdout.splitlines()[-1] == ending


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signals_reach_the_workers_and_their_code_comes_out(number: int) -> None:
    with Command("-m", "tests.run.tiny_workers", "waits") as command:
        while command.is_running() and "up" not in command.printed():
            time.sleep(0.02)
        command.send_signal(number)
        assert command.wait().stdout.splitlines()[-1].split()[0] == "75"


def test_an_open_run_folder_is_closed_and_shared_space_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o755)
    (run / "metrics.jsonl").touch()
    make_run_dir(str(run))
    assert run.stat().st_mode & 0o777 == 0o700
    make_run_dir(str(tmp_path / "new"))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is open to other users and holds files that are not a run's"):
        make_run_dir(str(shared))
    assert shared.stat().st_mode & 0o777 == 0o755
