"""Sweeps: every run once, the same prompts for every arm, and a comparison that a few lines of numpy can check."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.recipes import FinishedRun, read_runs, table
from scripts.sweep import Sweep, read_sweep, runs_of
from tests.commands import ROOT, Command, run_command

SWEEPS = sorted((ROOT / "benchmarks" / "sweeps").glob("*.yaml"))
TABLES = sorted((ROOT / "docs" / "results").glob("*.md"))
T_975 = (
    *(0, 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069),
)
"""Student's t(0.975) for n values, by n, from the printed table."""


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_arm_of_a_shipped_sweep_is_valid_and_sees_the_same_prompts(path: Path, monkeypatch) -> None:
    """Arms differ in algorithm and optimizer alone: the prompts are a function of what is compared here."""
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(path)
    first_seed = list(runs_of(replace(sweep, seeds=sweep.seeds[:1])))
    places = defaultdict(list)
    for run in first_seed:
        overrides = tuple(
            o if not o.startswith("model.path=") else "model.path=assets/demo_model" for o in run.overrides
        )
        config = replace(run, overrides=overrides).config()
        places[run.levels.get("start")].append(
            (config.data, config.rollout, config.evaluation, config.trainer, config.parallel, config.lora)
        )
    assert all(len(set(map(repr, same))) == 1 for same in places.values())
    assert len({run.folder for run in runs_of(sweep)}) == len(list(runs_of(sweep)))


def test_runs_come_seed_by_seed() -> None:
    axes = {"lr": {1e-4: ["optimizer.lr=1e-4"]}, "recipe": {"grpo": ["algorithm=grpo"], "ssopd": []}}
    runs = list(runs_of(Sweep("recipes_cpu", "runs/a", [3, 4], axes)))  # type: ignore[arg-type]
    assert [str(run.folder) for run in runs] == [
        f"runs/a/0.0001/{recipe}/seed_{seed}" for seed in (3, 4) for recipe in ("grpo", "ssopd")
    ]
    assert runs[0].overrides == ("optimizer.lr=1e-4", "algorithm=grpo", "trainer.seed=3")
    assert runs[0].levels == {"lr": "0.0001", "recipe": "grpo"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, one seed; the sweep is killed as soon as the first run is finished, and started again."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.yaml").write_text(
        f"config: recipes_cpu\nrun_dir: {folder}/runs\nseeds: [1]\n"
        "axes: {recipe: {grpo: [algorithm=grpo], ssopd: [algorithm=ssopd]}}\n"
        "overrides:\n- trainer.max_steps=2\n- trainer.eval_every=1\n- evaluation.samples=2\n"
        "- logging.save_rollouts=true\n- data.eval='demo:products?split=eval&count=5&seed=1'\n"
    )
    first = folder / "runs" / "grpo" / "seed_1" / "finished.json"
    with Command("scripts/sweep.py", str(folder / "sweep.yaml")) as command:
        while not first.exists():
            assert command.is_running(), f"the sweep ended before its first run did: {command.printed()}"
            time.sleep(0.05)
        os.killpg(command.pid, signal.SIGKILL)
    assert not (folder / "runs" / "ssopd" / "seed_1" / "finished.json").exists()
    (folder / "before").write_bytes(first.with_name("metrics.jsonl").read_bytes())
    done = run_command("scripts/sweep.py", str(folder / "sweep.yaml"))
    assert done.returncode == 0, done.output
    assert "2 runs, 1 finished already" in done.stdout
    return folder


@pytest.mark.heavy
def test_a_killed_sweep_repeats_no_run(swept: Path) -> None:
    """Metrics hold times, so a run that was repeated would not leave the same bytes."""
    assert (swept / "runs/grpo/seed_1/metrics.jsonl").read_bytes() == (swept / "before").read_bytes()
    assert json.loads((swept / "runs/ssopd/seed_1/finished.json").read_text())["levels"] == {"recipe": "ssopd"}
    listed = run_command("scripts/sweep.py", str(swept / "sweep.yaml"), "--list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["finished", "finished"]


@pytest.mark.heavy
def test_paired_arms_draw_the_same_prompts_in_the_same_order(swept: Path) -> None:
    def drawn(arm: str) -> list[str]:
        files = sorted((swept / "runs" / arm / "seed_1" / "rollouts").iterdir())
        return [json.loads(line)["problem"] for file in files for line in file.read_text().splitlines()]

    assert drawn("grpo") == drawn("ssopd")
    assert len(drawn("grpo")) == 2 * 4 * 8 and len(set(drawn("grpo"))) == 8


@pytest.mark.heavy
def test_collected_metrics_are_those_of_the_runs(swept: Path, tmp_path: Path) -> None:
    assert (
        run_command("benchmarks/recipes.py", "collect", str(swept / "runs"), str(tmp_path / "raw.jsonl")).returncode
        == 0
    )
    grpo, ssopd = read_runs(tmp_path / "raw.jsonl")
    rows = [json.loads(line) for line in (swept / "runs/ssopd/seed_1/metrics.jsonl").read_text().splitlines()]
    assert ssopd.curve == {row["step"]: row["eval/avg_at_n"] for row in rows}
    assert ssopd.final == sum(ssopd.final_correct) / (5 * 2) == rows[-1]["eval/avg_at_n"]
    assert ssopd.auc == pytest.approx((rows[1]["eval/avg_at_n"] + rows[2]["eval/avg_at_n"]) / 2)
    assert (grpo.rollouts, ssopd.rollouts) == (64, 64)
    assert grpo.curve[0] == ssopd.curve[0]


def refused(tmp_path: Path, text: str) -> str:
    (tmp_path / "sweep.yaml").write_text(text)
    result = run_command("scripts/sweep.py", str(tmp_path / "sweep.yaml"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.heavy
def test_a_bad_sweep_is_one_clear_line(tmp_path: Path) -> None:
    assert "is not a sweep" in refused(tmp_path, "config: recipes_cpu\nlevels: {}\n")
    assert "an axis is empty" in refused(
        tmp_path, f"config: recipes_cpu\nrun_dir: {tmp_path}\nseeds: [1]\naxes: {{a: {{}}}}\n"
    )
    wrong = f"config: recipes_cpu\nrun_dir: {tmp_path}\nseeds: [1]\naxes: {{lr: {{a: [optimizer.lr=-1]}}}}\n"
    assert "optimizer.lr=-1.0: give a value above 0" in refused(tmp_path, wrong)


def made_up(recipe: str, seed: int, final: float) -> FinishedRun:
    return FinishedRun(
        levels={"start": "a", "recipe": recipe},
        seed=seed,
        overrides=[],
        seconds=9,
        cpu_seconds=8,
        seconds_per_step=0.5,
        rollouts=640,
        tokens=1000,
        final_correct=[],
        evaluations={"eval/avg_at_n": {"0": 0.3, "5": 0.4, "10": final}},
        steps={},
    )


def test_the_table_by_hand() -> None:
    """Differences of 0.02, 0.04, 0.06, 0.08: as in test_statistics, scaled; seed 5 has no partner."""
    runs = [made_up("grpo", seed, 0.5) for seed in range(1, 6)]
    runs += [made_up("ssopd", seed, 0.5 + 0.02 * seed) for seed in range(1, 5)]
    text = table(runs, ["recipe"], "grpo")
    assert "| ssopd | final | 4 | +5.0 [+0.9, +9.1] |" in text
    assert "| ssopd | AUC | 4 | +2.5 [+0.4, +4.6] |" in text
    assert "| grpo | 5 | 50.0 % [50.0, 50.0] | 45.0 % [45.0, 45.0] | 640 | 1000 | 0.50 | 8 |" in text
    # t quantiles of 3 degrees of freedom: 3.182 at 95 %, 5.841 at 99 %.
    assert "| ssopd | final | 4 | +5.0 [-2.5, +12.5] |" in table(runs, ["recipe"], "grpo", confidence=0.99)
    with pytest.raises(ValueError, match="two runs of grpo at a, 1"):
        table([*runs, runs[0]], ["recipe"], "grpo")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_published_intervals_follow_from_the_raw_metrics(path: Path) -> None:
    """Every paired t interval of the final score, from the JSON lines and the printed t table alone."""
    text = path.read_text()
    sources = text.splitlines()[0].removeprefix("From ").removesuffix(".").split(", ")
    rows = [json.loads(line) for source in sources for line in (path.parent / source).read_text().splitlines()]
    axes, baseline = (
        re.search(pattern, text).group(1) for pattern in (r"\n\| (.*?) \| runs", r"Against (.*?), in points")
    )
    finals: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for row in rows:
        arm = " ".join(row["levels"][axis] for axis in axes.split())
        place = tuple(level for axis, level in row["levels"].items() if axis not in axes.split())
        curve = row["evaluations"]["eval/avg_at_n"]
        finals[arm][(*place, row["seed"])] = curve[max(curve, key=int)]
    checked = 0
    for arm in finals.keys() - {baseline}:
        d = [finals[arm][place] - finals[baseline][place] for place in finals[arm].keys() & finals[baseline].keys()]
        if not 1 < len(d) < len(T_975):
            continue
        half = T_975[len(d)] * statistics.stdev(d) / len(d) ** 0.5
        printed = re.search(rf"\n\| {re.escape(arm)} \| final \| {len(d)} \| (\S+) \[(\S+), (\S+)\]", text)
        assert printed, arm
        expected = [100 * statistics.mean(d), 100 * (statistics.mean(d) - half), 100 * (statistics.mean(d) + half)]
        assert [float(number) for number in printed.groups()] == pytest.approx(expected, abs=0.06), arm
        checked += 1
    assert checked
