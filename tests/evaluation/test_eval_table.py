"""The table's numbers, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_ssopd.evaluation.table import write_table


def finished(run_dir: Path, model: str, title: str, scores: list[float]) -> None:
    """A finished evaluation: two samples a problem."""
    folder = run_dir / model / title.replace(" ", "_")
    folder.mkdir(parents=True)
    share = {"value": float(np.mean(scores)), "low": 0.25, "high": 0.75}
    summary = {"title": title, "problems": len(scores), "samples": 2, "tokens": 9, "avg_at_n": share,
               "pass_at_1": share, "pass_at_n": share, "maj_at_n": share, "length_mean": {**share, "value": 1234.5},
               "truncated_fraction": share, "reasons": {"correct": 1},
               "scores": {f"p-{i}": score for i, score in enumerate(scores)}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def test_rows_are_models_and_columns_are_sets(tmp_path: Path) -> None:
    finished(tmp_path / "a", "base", "AIME 2024", [0.5, 0.0, 1.0, 0.5])
    finished(tmp_path / "a", "base", "HMMT 2025", [0.0, 0.5])
    finished(tmp_path / "b", "SSOPD", "AIME 2024", [1.0, 0.5, 1.0, 1.0])
    write_table([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# Avg@2, in percent"
    assert lines[2] == "|  | AIME 2024 | HMMT 2025 | Average |"
    assert lines[4] == "| base | 50.0 | 25.0 | 37.5 |"  # the mean of the sets, not of the problems (41.7)
    assert lines[5] == "| SSOPD | 87.5 | - | - |"
    # Paired: the differences are 0.5, 0.5, 0 and 0.5, so no resample is below 0 or above a half.
    difference = next(line for line in lines if line.startswith("| SSOPD | 37.5 ["))
    assert difference == "| SSOPD | 37.5 [12.5, 50.0] | - |"
    assert "| Avg@2 | pass@1 | pass@2 | maj@2 | truncated | tokens | problems |" in text and "1,234" in text
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["sets"] == ["AIME 2024", "HMMT 2025"]
    assert table["rows"][0]["average"]["value"] == pytest.approx(0.375)
    assert table["rows"][1]["average"] is None
    assert table["rows"][0]["sets"]["AIME 2024"]["avg_at_n"]["value"] == 0.5
    assert (tmp_path / "out" / "table.png").stat().st_size > 5000


def test_nothing_finished_and_the_same_twice_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished evaluation"):
        write_table([tmp_path], tmp_path)
    finished(tmp_path / "a", "base", "AIME 2024", [1.0])
    finished(tmp_path / "b", "base", "AIME 2024", [1.0])
    with pytest.raises(ValueError, match="base on AIME 2024 is there twice"):
        write_table([tmp_path / "a", tmp_path / "b"], tmp_path)
