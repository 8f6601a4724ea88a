"""The report: which numbers reach the figure and the page, and that nothing hostile survives on the page."""

from __future__ import annotations

import base64
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_ssopd.observe.report import draw, headline, last_samples, read_metrics, running_mean, series, write_report

HOSTILE = "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\ud800&amp;"


def rows(steps: int) -> list[dict[str, Any]]:
    """An evaluation at step 0 and at the end, and training steps whose reward is step / steps."""
    evaluation = {"eval/avg_at_n": 0.25, "eval/avg_at_n_low": 0.2, "eval/avg_at_n_high": 0.3}
    training = [
        {
            "step": step,
            "reward/mean": step / steps,
            "reward/reason/<b>wrong": 3,
            "ssopd/loss": None if step == 1 else -0.01,
            "ssopd/clipped_mass": 1.48,
            "rollout/logprob_mismatch": 0.0,
            "time/rollout": 2.0,
            "time/update": 3.0,
            "time/step": 5.5,
        }
        for step in range(1, steps + 1)
    ]
    training[-1] |= {"eval/avg_at_n": 0.5, "eval/avg_at_n_low": 0.4, "eval/avg_at_n_high": 0.6, "time/eval": 60.0}
    return [{"step": 0, **evaluation}, *training]


def write_run(run_dir: Path, steps: int = 40) -> Path:
    (run_dir / "eval").mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in rows(steps)]
    (run_dir / "metrics.jsonl").write_text("".join(lines) + '{"step": 41, "rew')
    (run_dir / "config.yaml").write_text("run_dir: x\nmodel:\n  path: <iframe>\n")
    samples = [
        {"problem": f"p<{i}>", "reward": float(i % 2), "reason": HOSTILE, "tokens": 9, "text": HOSTILE + "x" * 5000}
        for i in range(10)
    ]
    (run_dir / "eval" / "step_000000.jsonl").write_text("not read\n")
    (run_dir / "eval" / "step_000040.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return run_dir


def test_the_page_stands_alone_and_escapes_everything(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a<b>$x_$")
    write_report(run_dir)
    page = (run_dir / "report.html").read_text(encoding="utf-8")

    tags: list[str] = []
    links: list[str] = []

    class Collector(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            links.extend(str(value) for name, value in attrs if name in {"src", "href"} or name.startswith("on"))

    Collector().feed(page)
    assert not {"script", "iframe", "b", "link"} & set(tags)
    assert tags.count("img") == 1
    [image] = links
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == (run_dir / "report.png").read_bytes()
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "path: &lt;iframe&gt;" in page
    assert page.count("&lt;script&gt;") == 2 * 6  # reason and text of three correct and three wrong samples
    assert "<td>reward/reason/&lt;b&gt;wrong</td><td>3</td>" in page


def test_headline_takes_ends_of_the_evaluations_and_tenths_of_the_training() -> None:
    lines = {name: (start, end) for name, start, end in headline(rows(40))}
    assert lines["Avg@n"] == ("25.0% [20.0%, 30.0%]", "50.0% [40.0%, 60.0%]")
    # Steps 1 to 4 and 37 to 40 of 40: means 2.5 / 40 and 38.5 / 40.
    assert lines["Training reward"] == ("6.2%", "96.2%")
    assert lines["Seconds per step"] == ("5.5", "5.5")
    assert "Mixed groups" not in lines


@pytest.mark.parametrize("steps", [2, 40])
def test_the_figure_has_a_panel_for_what_was_logged_and_no_other(steps: int) -> None:
    figure = draw(rows(steps), title="run")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == [
        "Training reward",
        "Held-out problems, 95 % interval",
        "SSOPD loss, and KL before clipping",
        "Cut by the clip",
        "Trainer against engine",
        "Time of a step",
    ]
    reward = panels["Training reward"].lines[0].get_xydata()
    assert reward.tolist() == [[step, step / steps] for step in range(1, steps + 1)]
    assert panels["Cut by the clip"].get_ylim()[1] > 1.48
    assert panels["SSOPD loss, and KL before clipping"].get_ylim()[0] < -0.01
    # Stages are stacked largest first, up to the 5.5 s of the step.
    times = panels["Time of a step"]
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in times.collections]
    assert tops == [3.0, 5.0, 5.5]
    assert [text.get_text() for text in times.get_legend().get_texts()] == ["other", "rollout", "update"]


def test_a_run_without_a_training_step_still_draws() -> None:
    assert len(draw(rows(1)[:1], title="run").axes) == 1
    assert draw([{"step": 0}], title="run").axes == []


def test_reading(tmp_path: Path) -> None:
    read = read_metrics(write_run(tmp_path / "run"))
    assert [row["step"] for row in read] == list(range(41))  # without the line that was cut off
    assert series(read[:4], "ssopd/loss") == ([2, 3], [-0.01, -0.01])
    assert series(read, "no/such") == ([], [])
    [*correct, first_wrong, _, _] = last_samples(tmp_path / "run")
    assert [sample["problem"] for sample in correct] == ["p<1>", "p<3>", "p<5>"]
    assert len(first_wrong["text"]) == 4000 + len(" [...]")
    assert last_samples(tmp_path) == []


def test_rewards_of_a_user_s_function_are_drawn_and_sorted_by_the_run_s_threshold(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    assert [sample["reward"] for sample in last_samples(run_dir, threshold=-1.0)] == [0.0, 1.0, 0.0]
    (run_dir / "config.yaml").write_text("reward: {threshold: 1.0}\n")  # no reward is over it: three samples
    write_report(run_dir)
    assert (run_dir / "report.html").read_text(encoding="utf-8").count("&lt;script&gt;") == 2 * 3
    negative = [{"step": step, "reward/mean": step - 2.0} for step in range(1, 5)]
    [panel] = draw(negative, title="run").axes
    assert panel.get_ylim()[0] < -1 and panel.get_ylim()[1] > 2


def test_running_mean() -> None:
    assert running_mean([0.0, 3.0, 6.0, 9.0], 1) == [1.5, 3.0, 6.0, 7.5]
    assert running_mean([1.0, 2.0], 0) == [1.0, 2.0]


def test_missing_empty_and_broken_runs_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'metrics.jsonl'} does not exist")):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, ')
    with pytest.raises(ValueError, match="has not logged a step yet"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step" 1}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        write_report(tmp_path)


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    script = str(Path(__file__).parents[2] / "scripts" / "report.py")
    monkeypatch.setattr(sys, "argv", [script, str(run_dir), str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"report: .*none/metrics\.jsonl does not exist"):
        runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out == f"{run_dir}/report.png\n{run_dir}/report.html\n"
