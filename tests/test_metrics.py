"""Reductions that do not depend on how a batch is split, and sinks that keep what they are given."""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_ssopd.metrics import EffectiveShare, Max, Mean, Metrics, Min, Sum, merge, reduce_across_ranks
from nemo_ssopd.observe.sinks import ConsoleSink, JsonlSink, Logger, TensorBoardSink, sparkline
from nemo_ssopd.observe.stages import StageTimer
from tests.distributed import run_distributed


def test_merge_weighs_by_count_and_not_by_part() -> None:
    # Three tokens with entropy 1 and one with entropy 5: the mean is 2, the mean of the means would be 3.
    first: Metrics = {"loss/entropy": Mean(3.0, 3), "rollout/tokens": Sum(3), "optim/grad_norm": Max(0.5)}
    second: Metrics = {"loss/entropy": Mean(5.0, 1), "rollout/tokens": Sum(1), "eval/length_mean": Min(7)}
    merged = merge(first, second)
    assert {key: metric.value() for key, metric in merged.items()} == {
        "loss/entropy": 2.0,
        "rollout/tokens": 4.0,
        "optim/grad_norm": 0.5,
        "eval/length_mean": 7.0,
    }
    assert first["loss/entropy"] == Mean(3.0, 3)  # inputs are left alone


def test_every_split_of_a_batch_gives_the_same_metrics() -> None:
    values = [0.25, -1.5, 8.0, 3.0, 0.5, 2.0]

    def metrics(part: list[float]) -> Metrics:
        return {
            "loss/total": Mean(sum(part), len(part)),
            "rollout/tokens": Sum(sum(part)),
            "rollout/effective_sample_size": EffectiveShare(sum(part), sum(x * x for x in part), len(part)),
            "memory/most": Max(max(part, default=-math.inf)),
            "memory/least": Min(min(part, default=math.inf)),
        }

    whole = metrics(values)
    for cut in range(len(values) + 1):
        assert merge(metrics(values[:cut]), metrics(values[cut:])) == whole


def test_a_mean_of_nothing_is_nan_and_vanishes_in_a_merge() -> None:
    assert math.isnan(Mean(0.0, 0).value())
    assert Mean(0.0, 0).join(Mean(3.0, 2)).value() == 1.5


@pytest.mark.parametrize("reduction", [Max, Min])
def test_nan_shows_through_max_and_min(reduction: type[Max | Min]) -> None:
    for parts in [(1.0, math.nan), (math.nan, 1.0)]:
        merged = merge(*({"optim/grad_norm": reduction(x)} for x in parts))
        assert math.isnan(merged["optim/grad_norm"].value())


@pytest.mark.parametrize("key", ["entropy", "loss/", "/entropy"])
def test_a_key_without_area_or_name_is_an_error(key: str) -> None:
    with pytest.raises(ValueError, match="is not area/name"):
        merge({key: Sum(1)})
    with pytest.raises(ValueError, match="is not area/name"):
        Logger([]).log(0, {key: Sum(1)})


def test_two_reductions_of_one_key_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"loss/total is both Sum\(total=1\) and Mean\(total=1, count=1\)"):
        merge({"loss/total": Sum(1)}, {"loss/total": Mean(1, 1)})


def _reduced_on_this_rank() -> Metrics:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics: Metrics = {"reward/mean": Mean(3.0, 3) if rank == 0 else Mean(5.0, 1), "time/step": Max(1.0 + rank)}
    metrics[f"reward/reason/{'correct' if rank == 0 else 'timeout'}"] = Sum(2)
    reduced = reduce_across_ranks(metrics, dist.group.WORLD)
    dist.destroy_process_group()
    return reduced


@pytest.mark.heavy
def test_reduce_across_ranks() -> None:
    expected = {
        "reward/mean": Mean(8.0, 4),
        "time/step": Max(2.0),
        "reward/reason/correct": Sum(2),
        "reward/reason/timeout": Sum(2),
    }
    assert run_distributed(_reduced_on_this_rank, 2) == [expected, expected]
    assert reduce_across_ranks(expected, None) == expected


def test_stage_timer_adds_up_and_counts_the_slowest_rank() -> None:
    entered: list[str] = []
    timer = StageTimer(entered.append)
    for seconds in (0.02, 0.03):
        with timer.stage("rollout"):
            time.sleep(seconds)
    with pytest.raises(RuntimeError), timer.stage("train"):
        raise RuntimeError
    metrics = timer.metrics()
    assert list(metrics) == ["time/rollout", "time/train", "time/step", "memory/rollout_gib", "memory/train_gib"]
    assert entered == ["rollout", "rollout", "train"]
    assert 0.05 < metrics["memory/train_gib"].value() < 64
    assert 0.05 <= metrics["time/rollout"].value() <= metrics["time/step"].value() < 2.0
    assert merge({"time/step": Max(1.0)}, {"time/step": Max(4.0)})["time/step"].value() == 4.0


def test_stages_on_cuda_are_nvtx_ranges_and_show_what_the_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for a card of 80 GiB, whose engine fell asleep between the stages."""
    calls: list[str] = []
    free_gib, peaks_gib = iter([20, 60]), iter([50, 55])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (next(free_gib) * 2**30, 80 * 2**30))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: next(peaks_gib) * 2**30)
    monkeypatch.setattr("torch.cuda.nvtx.range_push", calls.append)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda: calls.append("pop"))
    timer = StageTimer()
    with timer.stage("rollout"):
        pass
    with pytest.raises(RuntimeError), timer.stage("update"):
        raise RuntimeError
    assert calls == ["reset", "rollout", "pop", "reset", "update", "pop"]
    memory = {key: metric.value() for key, metric in timer.metrics().items() if key.startswith("memory/")}
    assert memory == {
        "memory/rollout_gib": 60,
        "memory/rollout_torch_peak_gib": 50,
        "memory/update_gib": 20,
        "memory/update_torch_peak_gib": 55,
    }


def read_lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_keeps_numbers_exactly_and_writes_null_for_nan(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    logger = Logger([JsonlSink(path)])
    logger.log(0, {"loss/total": Mean(0.1, 3), "ssopd/loss": Mean(0, 0)})
    logger.log(1, {"loss/total": Max(math.inf)})
    # Read before it is closed: each step is flushed, so that a killed run keeps it.
    assert read_lines(path) == [
        {"step": 0, "loss/total": 0.1 / 3, "ssopd/loss": None},
        {"step": 1, "loss/total": None},
    ]
    logger.close()


def test_jsonl_resume_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Logger([JsonlSink(path)]) as logger:
        for step in range(5):
            logger.log(step, {"reward/mean": Mean(step, 1)})
    with path.open("a") as file:
        file.write('{"step": 5, "reward/me')  # killed while writing
    with Logger([JsonlSink(path, start_step=3)]) as logger:
        logger.log(3, {"reward/mean": Mean(30, 1)})
    assert [(line["step"], line["reward/mean"]) for line in read_lines(path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    JsonlSink(path).close()
    assert path.read_text() == ""
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard(tmp_path: Path) -> None:
    with Logger([TensorBoardSink(tmp_path)]) as logger:
        logger.log(3, {"reward/mean": Mean(1, 4), "ssopd/loss": Mean(0, 0)})
        logger.log(4, {"reward/mean": Mean(3, 4), "ssopd/loss": Mean(2, 1)})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(3, 0.25), (4, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("ssopd/loss")] == [(4, 2.0)]


STEP: Metrics = {
    "reward/mean": Mean(3, 8),
    "group/mixed_fraction": Mean(5, 8),
    "ssopd/loss": Mean(0.03, 1),
    "ssopd/clipped_positions": Mean(3, 40),
    "progress/tokens_per_second": Max(12345.6),
    "time/rollout": Max(3.21),
    "time/step": Max(5.0),
}


def test_console_prints_one_plain_line_per_step_when_it_is_not_a_terminal() -> None:
    output = io.StringIO()
    with Logger([ConsoleSink(10, console=Console(file=output, width=80))]) as logger:
        logger.log(0, {"eval/avg_at_n": Mean(1, 4)})
        logger.log(10, STEP)
    assert output.getvalue() == (
        "step 0/10  Avg@n 25.0%  eta -\n"
        "step 10/10  reward 0.375  mixed 62%  ssopd +0.0300  clipped 7.5%  tokens/s 12,346"
        "  5.0 s (rollout 3.2)  eta 0:00:00\n"
    )


def test_console_panel_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, record=True)
    with Logger([ConsoleSink(10, start_step=4, console=console)]) as logger:
        logger.log(5, {**STEP, "eval/avg_at_n": Mean(1, 4)})
        logger.log(6, {**STEP, "reward/mean": Mean(1, 2)})
    text = console.export_text()
    last = text[text.rindex("SSOPD ─") :]
    for shown in ["6/10", "0.500", "62%", "+0.0300", "7.5%", "12,346", "25.0%", "rollout 3.2 s", "eta 0:00:0"]:
        assert shown in last, (shown, last)


def test_sparkline_scales_to_its_window() -> None:
    assert sparkline([9.0, 0.0, 0.5, 1.0], width=3) == "▁▅█"
    assert sparkline([2.0, math.nan, 2.0], width=3) == "▁▁"
    assert sparkline([], width=3) == ""
