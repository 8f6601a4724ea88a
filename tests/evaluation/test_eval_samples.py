"""What is drawn and what is kept: by a collector that answers from its seeds, so that every sample is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_ssopd.config.sections import EvaluationConfig
from nemo_ssopd.evaluation import samples as module
from nemo_ssopd.evaluation.results import SAMPLES, SetWriter, check_folder, check_identity
from nemo_ssopd.evaluation.samples import Sample, evaluate, read_samples, summary_of, to_lines
from nemo_ssopd.rollout.collector import request_seed
from nemo_ssopd.rollout.verifier import Verdict
from nemo_ssopd.types import Completion, Prompt, RenderedPrompt

CONFIG = EvaluationConfig(samples=3, max_new_tokens=5, seed=7)
PROMPTS = [RenderedPrompt(Prompt(f"p-{i}", f"{i}*3", "1"), (1, i)) for i in range(7)]
ABOUT = {"model": {"path": "m", "fingerprint": "ab"}, "data": {"digest": "cd"}, "evaluation": {"seed": 7}}


class SeededCollector:
    """One completion per seed, which is its text; odd ones are right. `drawn` are all seeds asked for."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def generate(self, prompts: Any, *, seeds: Any, sampling: Any) -> list[list[Completion]]:
        self.drawn += [seed for row in seeds for seed in row]
        return [[Completion((0,) * (s % 5 + 1), (), str(s), "length" if s % 5 == 4 else "stop", 0) for s in row]
                for row in seeds]  # fmt: skip

    def grade(self, completions: list[Completion], problems: list[Prompt]) -> list[Verdict]:
        assert [problem.id for problem in problems] == sorted(problem.id for problem in problems)
        return [Verdict(float(int(c.text) % 2), "correct", c.text[-1]) for c in completions]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> SeededCollector:
    def gather(gathered: list[Any], local: Any, group: Any) -> None:
        gathered[:] = [local]

    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    return SeededCollector()


class OneRank:
    def size(self) -> int:
        return 1


def draw(collector: Any, **options: Any) -> list[Sample]:
    batches = evaluate(collector, PROMPTS, CONFIG, dp_rank=0, dp_size=1, cpu_group=OneRank(), **options)  # type: ignore[arg-type]
    return [sample for batch in batches for sample in batch]


def test_a_sample_is_decided_by_its_problem_and_number_alone(collector: SeededCollector) -> None:
    whole = draw(collector)
    assert [sample.place for sample in whole] == [(f"p-{i}", k) for i in range(7) for k in range(3)]
    assert [int(sample.text) for sample in whole] == [
        request_seed(7, "eval", f"p-{i}", k) for i in range(7) for k in range(3)
    ]
    assert draw(collector, batch=2) == draw(collector, batch=100) == whole


def test_what_is_done_is_not_drawn_again(collector: SeededCollector) -> None:
    whole = draw(collector)
    done = {("p-0", 0), ("p-0", 1), ("p-0", 2), ("p-1", 1), ("p-6", 2)}
    collector.drawn.clear()
    rest = draw(collector, batch=2, done=done)
    assert rest == [sample for sample in whole if sample.place not in done]
    assert collector.drawn == [int(sample.text) for sample in rest]


def test_an_interrupted_file_continues_where_it_ended(collector: SeededCollector, tmp_path: Path) -> None:
    whole = draw(collector)
    for cut in (0, 1, 40, 200, 1000, len(to_lines(whole)) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / SAMPLES).write_text(to_lines(whole)[:cut])
        writer = SetWriter(folder, ABOUT)
        assert len(writer.samples) == to_lines(whole)[:cut].count("\n")
        for batch in evaluate(
            collector, PROMPTS, CONFIG, dp_rank=0, dp_size=1, cpu_group=OneRank(), batch=2,
            done={sample.place for sample in writer.samples},
        ):  # type: ignore[arg-type]  # fmt: skip
            writer.append(batch)
        summary = writer.finish(PROMPTS, CONFIG, "seven", threshold=0.5)
        writer.close()
        assert (folder / SAMPLES).read_text() == to_lines(whole)
        assert summary["avg_at_n"]["value"] == pytest.approx(sum(s.reward for s in whole) / 21)
        assert summary["tokens"] == sum(s.tokens for s in whole)
        assert summary["scores"]["p-3"] == pytest.approx(sum(s.reward for s in whole[9:12]) / 3)


def test_lines_survive_any_text(tmp_path: Path) -> None:
    texts = ["\n", "\u2028", "\ud800", '"}', "", "\x00"]
    samples = [Sample("p", k, 0.0, "no_box", None, "1", 3, False, text) for k, text in enumerate(texts)]
    (tmp_path / "s.jsonl").write_text(to_lines(samples) + '{"problem": "p", "sam')
    assert read_samples(tmp_path / "s.jsonl") == samples


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    good = to_lines([Sample("p", 0, 0.0, "no_box", None, "1", 3, False, "")])
    for text, words in (("garbage\n", "line 2 is not a sample"), (good, "line 2 repeats sample 0 of p")):
        (tmp_path / "s.jsonl").write_text(good + text)
        with pytest.raises(ValueError, match=words):
            read_samples(tmp_path / "s.jsonl")


def test_a_folder_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    check_folder(tmp_path / "new", resume=False)
    writer = SetWriter(tmp_path / "set", ABOUT)
    with pytest.raises(ValueError, match="give another run_dir, or continue it with resume=true"):
        check_folder(tmp_path / "set", resume=False)
    with pytest.raises(ValueError, match="is being written by another process"):
        SetWriter(tmp_path / "set", ABOUT)
    writer.close()
    moved = {**ABOUT, "model": {"path": "elsewhere", "fingerprint": "ab"}}
    check_identity(tmp_path / "set", moved)
    for section, key, value in (("model", "fingerprint", "xy"), ("data", "digest", "x"), ("evaluation", "seed", 8)):
        other = {**ABOUT, section: {**ABOUT[section], key: value}}
        with pytest.raises(ValueError, match=f"{section}.{key} was .* and is {value!r} now"):
            SetWriter(tmp_path / "set", other)


def test_rewards_beyond_0_and_1_are_averaged_and_counted_over_the_threshold(tmp_path: Path) -> None:
    rewards = {"p-0": [0.2, 0.7, 1.5], "p-1": [-1.0, 0.7, 0.7]}
    samples = [
        Sample(name, k, reward, f"tests: {k} of 3", "8" if reward > 0.5 else None, "", 3, False, "")
        for name, row in rewards.items()
        for k, reward in enumerate(row)
    ]
    writer = SetWriter(tmp_path / "set", ABOUT)
    writer.append(samples)
    summary = writer.finish(PROMPTS[:2], CONFIG, "two", threshold=0.7)
    writer.close()
    assert summary["avg_at_n"]["value"] == pytest.approx((2.4 / 3 + 0.4 / 3) / 2)
    assert summary["scores"] == pytest.approx({"p-0": 0.8, "p-1": 0.4 / 3})
    # Over 0.7 is the 1.5 alone: one of three, none of three. Its answer has one of two votes in its row.
    assert summary["pass_at_1"]["value"] == pytest.approx(1 / 6)
    assert summary["pass_at_n"]["value"] == 0.5
    assert summary["maj_at_n"]["value"] == 0.25
    assert summary["reasons"] == {"tests": 6}


def test_summary_by_brute_force(collector: SeededCollector) -> None:
    whole = draw(collector)
    rows = [whole[i : i + 3] for i in range(0, 21, 3)]
    summary = {key: estimate.value for key, estimate in summary_of(whole, CONFIG, threshold=0.5).items()}

    def of_pairs(row: list[Sample]) -> float:
        return sum(max(a.reward, b.reward) for a in row for b in row if a.sample < b.sample) / 3

    assert summary["eval/avg_at_n"] == pytest.approx(sum(s.reward for s in whole) / 21)
    assert summary["eval/pass_at_2"] == pytest.approx(sum(map(of_pairs, rows)) / 7)
    assert summary["eval/pass_at_n"] == pytest.approx(sum(any(s.reward for s in row) for row in rows) / 7)
    assert summary["eval/length_mean"] == pytest.approx(sum(s.tokens for s in whole) / 21)
    assert summary["eval/truncated_fraction"] == pytest.approx(sum(s.tokens == 5 for s in whole) / 21)
    assert json.loads(to_lines(whole).splitlines()[0])["gold"] == "1"
