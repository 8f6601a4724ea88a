"""The GPU report without a GPU: its stages at tiny sizes on the CPU, and what it does with steps that go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_report.stage import missing_package
from scripts import gpu_report
from scripts.gpu_report import Step
from tests.commands import ROOT, run_command
from tests.gpu_report_steps import dies, finds, good, hangs, leaves, raises, sees

pytestmark = pytest.mark.heavy

STEPS = "tests.gpu_report_steps"


# ---- Steps that go wrong: tests/gpu_report_steps.py ------------------------------------------------------------------


def reported(folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: Step, seconds: str = "100") -> dict[str, Any]:
    monkeypatch.setattr(gpu_report, "STEPS", steps)
    stages = [step.stage for step in steps]
    code = gpu_report.main(["--device", "cpu", "--output", str(folder), "--seconds", seconds, "--stages", *stages])
    report = json.loads((folder / "gpu_report.json").read_text())
    statuses = {step["status"] for step in report["steps"].values()}
    assert code == (0 if statuses <= {"passed", "skipped"} else 1)
    return report["steps"]


def step(function: Any, *arguments: str, **options: Any) -> Step:
    options = {"limit_s": 30.0, **options}
    return Step(function.__name__, function.__name__, f"{STEPS}:{function.__name__}", arguments=arguments, **options)


def test_every_step_survives_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    monkeypatch.setattr(gpu_report, "CPU_FACTOR", 1.0)
    steps = reported(
        tmp_path, monkeypatch, step(raises), step(hangs, str(pid_file), limit_s=10), step(dies), step(good)
    )
    assert {name: entry["status"] for name, entry in steps.items()} == {
        "raises": "failed",
        "hangs": "killed",
        "dies": "failed",
        "good": "passed",
    }
    assert steps["raises"]["reason"] == "ValueError: no such luck"
    assert "limit of 10 s" in steps["hangs"]["reason"]
    assert "signal 6" in steps["dies"]["reason"]
    for name in ("raises", "hangs", "dies"):
        assert [row["name"] for row in steps[name]["results"]] == ["before"]
    assert not psutil.pid_exists(int(pid_file.read_text())) or psutil.Process(int(pid_file.read_text())).status() == (
        psutil.STATUS_ZOMBIE
    )
    page = (tmp_path / "gpu_report.md").read_text()
    assert "| a number | 1 ms | < 2 | ok |" in page
    assert "| another | skipped: it needs a rival | | |" in page
    assert "s: it ran past its limit of 10 s" in page
    assert "no such luck" in (tmp_path / "00_raises.log").read_text()


@pytest.mark.parametrize("value", ["3.0", "nan"])
def test_a_broken_limit_fails_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    steps = reported(tmp_path, monkeypatch, step(good, value))
    assert steps["good"]["status"] == "failed"
    assert steps["good"]["reason"] == "limits broken: a number"


def test_results_are_on_disk_while_a_step_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "STEPS", (step(hangs, str(tmp_path / "pid")),))
    written: list[dict[str, Any]] = []

    def keep(path: Path, text: str) -> None:
        if path.suffix == ".json":
            written.append(json.loads(text)["steps"]["hangs"])

    monkeypatch.setattr(gpu_report, "_replace", keep)
    gpu_report.main(["--device", "cpu", "--output", str(tmp_path), "--seconds", "10", "--stages", "hangs"])
    assert [entry["status"] for entry in written] == ["running", "running", "killed"]
    assert [len(entry["results"]) for entry in written] == [0, 1, 1]


def test_what_is_not_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = reported(tmp_path, monkeypatch, step(hangs, str(tmp_path / "pid")), step(good), seconds="6")
    assert steps["hangs"]["status"] == "killed"
    assert steps["good"] == {"status": "not reached", "reason": "--seconds 6 are over"}


def test_steps_beside_each_other_are_waited_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = reported(tmp_path, monkeypatch, step(leaves, runs_beside=True), step(good), step(finds))
    assert [entry["status"] for entry in steps.values()] == ["passed"] * 3


def test_steps_get_the_environment_and_the_checkout_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "kept")
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    steps = reported(tmp_path, monkeypatch, step(sees))
    values = {row["name"]: row["value"] for row in steps["sees"]["results"]}
    assert values == {"preload": "kept", "visible": "", "path": [str(ROOT), "/somewhere/else"]}


def test_a_part_of_a_package_that_is_missing_is_a_failure() -> None:
    assert missing_package(ModuleNotFoundError(name="vllm")) == "vllm"
    assert missing_package(ModuleNotFoundError(name="vllm.lora")) is None
    assert missing_package(ModuleNotFoundError(name="nemo_ssopd.megatron.lora")) is None
    assert missing_package(ModuleNotFoundError(name="benchmarks")) is None


# ---- The stages, on the CPU ------------------------------------------------------------------------------------------

HIDING = """
import os, sys
class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in os.environ["HIDDEN"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hiding())
"""


STAGES = ("scripts/gpu_report.py", "--device", "cpu", "--seconds", "900", "--stages")


def test_the_stages_of_the_trainer_run_on_the_cpu(tmp_path: Path) -> None:
    done = run_command(*STAGES, "kernels", "benchmark", "actor", "model", "--output", str(tmp_path))
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    logs = "\n".join(file.read_text()[-3000:] for file in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, (report["steps"], logs)
    assert all(entry["status"] == "passed" for entry in report["steps"].values())
    assert report["machine"]["card"] == "none, on the CPU"
    assert {"python", "torch", "megatron.core"} <= report["machine"].keys()
    rows = {row["name"]: row for entry in report["steps"].values() for row in entry["results"]}
    for what in ("entropy", "clipped KL", "gradient of the clipped KL", "gradient of log-probs"):
        assert rows[f"{what}, T=5, V=2051, bfloat16: relative error"]["ok"]
    assert any("torch.compile" in name for name in rows)
    compared = "ColumnParallelLinear in bfloat16 on cpu against ColumnParallelLinear in float32 on cpu"
    for mode in ("adapters", "all weights"):
        # Equal arithmetic but for rounding: neither exact nor far.
        assert 1e-4 < rows[f"{mode}: {compared}: gradient, relative error"]["value"] < 0.15
        assert rows[f"{mode}: Adam's step counts after resume"]["value"] == [3]
    assert rows["update: aten::_local_scalar_dense"]["value"] > 0
    kinds = sum(row["value"] for name, row in rows.items() if row.get("unit", "").startswith("of the kernels' time"))
    assert kinds == pytest.approx(1.0)


def test_missing_packages_are_skipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "HIDDEN": "megatron,hydra"}
    command = [sys.executable, *STAGES, "actor", "run", "--output", str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, timeout=950).returncode == 0
    steps = json.loads((tmp_path / "out" / "gpu_report.json").read_text())["steps"]
    for name in ("actor", "actor, float32 on the CPU", "run, merged refit", "run, resumed with adapter refit"):
        assert steps[name]["status"] == "skipped", steps[name]
        assert steps[name]["reason"] in ("hydra is not installed", "megatron is not installed")
    skipped = [row["name"] for row in steps["actor, compared"]["results"]]
    assert skipped == ["the actor's reference", "the actor's policy", "the actor's local"]
