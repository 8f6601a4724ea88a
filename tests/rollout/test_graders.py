"""The two graders behind one protocol; the user's function in real worker processes, however it misbehaves."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from nemo_ssopd.config.run import Config, RewardConfig, VerifierConfig
from nemo_ssopd.rollout.graders import Grader, build_grader, check_grader
from nemo_ssopd.rollout.verifier import Verdict
from nemo_ssopd.types import Prompt

pytestmark = pytest.mark.heavy

REWARDS = r'''
"""Rewards for tests: the completion says what to do."""
import os, signal, subprocess, sys, time

LEVELS = {"easy": 0.25, "hard": 1.5}
print("printed at import")
started = []


def grade(completion, row):
    if completion.startswith("\\boxed"):
        return completion == f"\\boxed{{{row['answer']}}}"
    if completion == "level":
        return LEVELS[row["level"]]
    if completion == "tests":
        return sum(row["tests"]) / len(row["tests"]), f"passed: {sum(row['tests'])} of {len(row['tests'])}"
    return globals()[completion](row)


def negative(row): return -0.5, "too long: 9"
def killed(row): return 1.0, "killed"
def loud(row):
    print("x" * 100_000)
    os.write(1, b"\x00\x00\x00\x02{}")
    os.write(2, b"noise")
    sys.stdout.flush()
    return 0.75
def reads_stdin(row):
    done = subprocess.run([sys.executable, "-c", "import sys; print(len(sys.stdin.read()))"], capture_output=True)
    return float(done.stdout) == 0 and sys.stdin.read() == ""
def environment(row): return "HF_TOKEN" not in os.environ and row["problem"] == "6*7"
def busy(row):
    while True: pass
def sleeps(row): time.sleep(60)
def leaves_a_process(row):
    with open(row["pidfile"], "w") as file:
        file.write(str(subprocess.Popen(["sleep", "600"]).pid))
    return 1
def leaves_a_process_and_hangs(row):
    leaves_a_process(row)
    time.sleep(60)
def exits(row): os._exit(0)
def leaves(row): sys.exit("bye")
def segfault(row): os.kill(os.getpid(), signal.SIGSEGV)
def bomb(row):
    kept = []
    while True: kept.append(bytearray(2**26))
def forgets(row): return {}["tests"]
def recursion(row): return recursion(row)
def nan(row): return float("nan")
def infinite(row): return 10**400
def nothing(row): return None
def text(row): return "0.3"
def bad_reason(row): return 0.3, 7
def wordy(row): return 0.6, "w" * 5000
'''
GRADED = "rewards_of_the_test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the user's, with their module in it."""
    folder = tmp_path_factory.mktemp("start")
    (folder / f"{GRADED}.py").write_text(REWARDS)
    return folder


def config(function: str | None = None, *, threshold: float = 0.5, **limits: float) -> Config:
    limits = {"workers": 1, "timeout_s": 60.0, "memory_gb": 0.5, **limits}
    return Config(reward=RewardConfig(function=function, threshold=threshold), verifier=VerifierConfig(**limits))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def grader(folder: Path) -> Iterator[Grader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", "secret")
        started = build_grader(config(f"{GRADED}:grade", workers=2, cpu_s=0.6))
        yield started
        started.close()


def problem(**columns: object) -> Prompt:
    return Prompt("p-1", "6*7", "42", columns=json.dumps(columns))


def graded(grader: Grader, completion: str, **columns: object) -> Verdict:
    [verdict] = grader.grade([completion], [problem(**columns)])
    return verdict


# ---- What a function returns -----------------------------------------------------------------------------------------


def test_rewards_reasons_and_answers_come_back_in_order(grader: Grader) -> None:
    completions = [r"\boxed{42}", r"\boxed{41}", "level", "level", "tests", "negative", "killed"]
    rows = [{}, {}, {"level": "easy"}, {"level": "hard"}, {"tests": [1, 0, 1, 1]}, {}, {}]
    assert grader.grade(completions, [problem(**row) for row in rows]) == [
        Verdict(1.0, "correct", "42"),
        Verdict(0.0, "wrong", "41"),
        Verdict(0.25, "wrong", None),
        Verdict(1.5, "correct", None),
        Verdict(0.75, "passed: 3 of 4", None),
        Verdict(-0.5, "too long: 9", None),
        Verdict(1.0, "killed", None),  # a word of the user's, not a child that somebody killed
    ]


def test_without_a_reason_the_threshold_gives_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    grader = build_grader(config(f"{GRADED}:grade", threshold=0.2))
    assert graded(grader, "level", level="easy") == Verdict(0.25, "correct", None)
    grader.close()


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("nan", "error: returned nan, which is no finite number"),
        ("infinite", "error: returned "),
        ("nothing", "error: returned None, which is no finite number"),
        ("text", "error: returned '0.3', which is no finite number"),
        ("bad_reason", "error: returned (0.3, 7), whose reason is no text"),
        ("forgets", f"error: KeyError ({GRADED}.py, line "),
        ("missing", f"error: KeyError ({GRADED}.py, line "),
        ("recursion", f"error: RecursionError ({GRADED}.py, line "),
        ("busy", "timeout"),
        ("exits", "crash"),
        ("leaves", "crash"),
        ("segfault", "crash"),
        ("bomb", "memory"),
    ],
)
def test_a_failure_is_a_reward_of_0_with_a_reason_and_the_next_completion_is_graded(
    grader: Grader, completion: str, reason: str
) -> None:
    failed, next_one = grader.grade([completion, r"\boxed{42}"], [problem(), problem()])
    assert failed.reward == 0.0 and failed.reason.startswith(reason), failed
    assert next_one == Verdict(1.0, "correct", "42")


def test_what_it_prints_or_starts_does_not_reach_the_protocol(grader: Grader) -> None:
    assert graded(grader, "loud") == Verdict(0.75, "correct", None)
    assert graded(grader, "reads_stdin").reward == 1.0
    assert graded(grader, "environment").reward == 1.0
    assert graded(grader, "wordy").reason == "w" * 200


def test_large_rows_and_any_text_arrive(grader: Grader) -> None:
    assert graded(grader, "tests", tests=[1] * 300_000).reward == 1.0
    assert graded(grader, "\ud800\x00").reason.startswith("error: KeyError")


# ---- Limits ----------------------------------------------------------------------------------------------------------


def test_the_wall_clock_ends_what_uses_no_cpu_and_all_that_it_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    grader = build_grader(config(f"{GRADED}:grade", timeout_s=2.0))
    started = time.monotonic()
    assert graded(grader, "sleeps") == Verdict(0.0, "timeout", None)
    pids = folder / "a", folder / "b"
    assert graded(grader, "leaves_a_process_and_hangs", pidfile=str(pids[0])).reason == "timeout"
    assert time.monotonic() - started < 50
    assert not alive(int(pids[0].read_text()))
    assert graded(grader, "leaves_a_process", pidfile=str(pids[1])).reward == 1.0
    grader.close()
    assert not alive(int(pids[1].read_text()))


def alive(pid: int) -> bool:
    """Whether it still runs a while later."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.05)
    return True


def test_the_trainer_never_imports_the_function(grader: Grader) -> None:
    assert graded(grader, "level", level="easy").reward == 0.25
    assert GRADED not in sys.modules


# ---- A function that cannot be used ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "source", "words"),
    [
        ("nowhere_to_be_found:grade", "", "importing nowhere_to_be_found finds no module 'nowhere_to_be_found' in"),
        ("bad_a:grade", "import nowhere_to_be_found", "finds no module 'nowhere_to_be_found'"),
        ("bad_b:grade", "def grade(", "importing bad_b failed with SyntaxError"),
        ("bad_c:grade", "raise OSError('no such table')", "importing bad_c failed with OSError('no such table')"),
        ("bad_d:grade", "def reward(completion, row): return 1", "has no 'grade': give one of reward"),
        ("bad_e:grade", "grade = 3", "is a int: give the name of a function"),
        ("bad_f:grade", "def grade(completion): return 1", "grade(completion) cannot be called: let it take"),
        ("bad_g:grade", "import os; os._exit(3)", "died 3 times while starting"),
        ("bad_h:grade", "import sys; sys.exit(3)", "importing bad_h failed with SystemExit(3)"),
        (
            "bad_i:grade",
            "kept = bytearray(2**31)",
            "failed with MemoryError(): correct it, or raise verifier.memory_gb",
        ),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_the_start(
    function: str, source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{function.partition(':')[0]}.py").write_text(source) if source else None
    monkeypatch.chdir(tmp_path)
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ValueError) as error:
        check_grader(config(function))
    assert f"reward.function='{function}': a grading worker" in str(error.value) and words in str(error.value)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= {child.pid for child in before}


def test_it_is_found_on_pythonpath_too_and_in_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "library" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "of_length.py").write_text("def shorter(completion, row):\n    return 1 / len(completion)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "library"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    check_grader(config("mine.of_length:shorter"))
    grader = build_grader(config("mine.of_length:shorter"))
    assert graded(grader, "four") == Verdict(0.25, "wrong", None)
    grader.close()


# ---- math-verify -----------------------------------------------------------------------------------------------------


def test_without_a_function_math_verify_compares_with_the_answer() -> None:
    check_grader(config())
    grader = build_grader(replace(config(), verifier=VerifierConfig(workers=1, timeout_s=60.0, cpu_s=20.0)))
    problems = [Prompt("a", "?", "42"), Prompt("b", "?", "0.5"), Prompt("c", "?", "0.5")]
    assert grader.grade([r"\boxed{42}", r"\boxed{\frac{2}{4}}", "0.5"], problems) == [
        Verdict(1.0, "correct", "42"),
        Verdict(1.0, "correct", r"\frac{2}{4}"),
        Verdict(0.0, "no_box", None),
    ]
    grader.close()
