"""The commands with every real part: two processes, Megatron-Core, vLLM, math-verify, checkpoints, export.

One run is the real command line from a shell; its figures are those of the forked ones.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import BOUND_S, LAUNCHERS_OWN, ROOT, Command, Done, run_command

pytestmark = pytest.mark.heavy

WHOLE = ("trainer.max_steps=4", "trainer.save_every=2", "trainer.eval_every=0", "evaluation.samples=2")
VOLATILE = ("time/", "memory/", "progress/tokens_per_second")


def command(run_dir: Path, *overrides: str, config: str = "tiny_cpu") -> tuple[str, ...]:
    few = "data.train='demo:products?count=200&seed=1'"  # every process renders all of them
    return "scripts/train_ssopd.py", "--config-name", config, f"run_dir={run_dir}", few, *overrides


def train(run_dir: Path, *overrides: str, config: str = "tiny_cpu") -> Done:
    return run_command(*command(run_dir, *overrides, config=config))


def finished(run_dir: Path, *overrides: str, config: str = "tiny_cpu") -> Path:
    result = train(run_dir, *overrides, config=config)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return run_dir


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def repeatable(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith(VOLATILE)}


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of SSOPD at tensor-parallel size 2, with a checkpoint after two, and an evaluation at both ends.

    The one run of the tests that a shell's own command starts, with all that its three processes import.
    """
    run_dir = tmp_path_factory.mktemp("runs") / "ssopd"
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHERS_OWN}
    result = subprocess.run(
        [sys.executable, *command(run_dir, *WHOLE)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return run_dir


def test_a_run_logs_what_the_method_promises(run: Path) -> None:
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert row["rollout/logprob_mismatch_max"] < 1e-4  # float32: the engine has the trainer's weights at every step
        assert row["ssopd/pairs"] == pytest.approx(4 * row["group/mixed_fraction"])
        assert row["optim/skipped_steps"] == 0
    assert sum(row["ssopd/pairs"] for row in rows[1:]) > 0
    assert 0 < rows[0]["eval/avg_at_n"] < 1
    for row in (
        rows[0],
        rows[-1],
    ):  # measured: 0.53 and 0.76 of the problems that the policy solves in one of two samples
        assert row["eval/teacher_problems"] > 10
        assert row["eval/teacher_accuracy"] > 0.4


def test_a_run_leaves_rollouts_and_a_report(run: Path) -> None:
    rollouts = [json.loads(line) for file in sorted(run.glob("rollouts/*")) for line in file.read_text().splitlines()]
    assert len(rollouts) == 4 * 4 * 8
    assert {rollout["reward"] for rollout in rollouts} == {0.0, 1.0}
    assert (run / "report.png").stat().st_size > 10_000
    assert "data:image/png;base64" in (run / "report.html").read_text()
    assert (run / "config.yaml").is_file()


def test_the_export_is_the_trained_model(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    before = load_file(ROOT / "assets/demo_model/model.safetensors")
    after = exported(run)
    assert after.keys() == before.keys()
    assert max((after[name] - before[name]).abs().max().item() for name in after) > 1e-4
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "6*3 8*6 3*2"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(model.generate(**chat, max_new_tokens=80, do_sample=False)[0])
    assert r"\boxed{" in text


def test_an_interrupted_run_continues_bit_for_bit(run: Path, tmp_path: Path) -> None:
    assert_continues(run, 4, 2, tmp_path / "resumed", *WHOLE)


def assert_continues(
    run: Path, last: int, saved: int, resumed: Path, *overrides: str, config: str = "tiny_cpu"
) -> None:
    """A copy of `run` that lost what came after its checkpoint `saved` ends as the run did, with the same bits."""
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"iter_{last:07}")
    (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(saved))
    shutil.rmtree(resumed / "hf")
    finished(resumed, *overrides, "trainer.resume=true", config=config)
    assert list(map(repeatable, metrics(resumed))) == list(map(repeatable, metrics(run)))
    for file in run.glob("rollouts/*"):
        assert (resumed / "rollouts" / file.name).read_text() == file.read_text()
    for name, tensor in exported(run).items():
        assert torch.equal(exported(resumed)[name], tensor), name


def test_a_profiled_and_deterministic_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    """Both flags change no figure on CPU. The trace has the step's stages, one after the other, as long as its metrics
    say, and the update's matmuls are in the update."""
    options = ("trainer.max_steps=2", "trainer.profile_steps=[2]", "trainer.deterministic=true", "trainer.export=false")
    result = train(tmp_path / "run", *options, "trainer.eval_at_ends=false")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    rows = metrics(tmp_path / "run")
    assert list(map(repeatable, rows)) == list(map(repeatable, metrics(run)[1:3]))

    folder = tmp_path / "run" / "profile"
    names = [f"step_000002_rank_000{rank}.json.gz" for rank in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert f"in {folder}: trace {names[0]}, no memory snapshot: there is no CUDA" in result.stdout
    stages = {"rollout", "verify", "score", "teacher", "update", "refit"}
    seconds: list[dict[str, float]] = []
    for name in names:
        with gzip.open(folder / name, "rt") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
        ranges = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "user_annotation")
        ranges = [(start, end, stage) for start, end, stage in ranges if stage in stages]
        assert [stage for _, _, stage in ranges] == ["rollout", "verify", "score", "teacher", "update", "refit"]
        assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(ranges))
        matmuls = [event["ts"] for event in events if event["name"] == "aten::addmm" or event["name"] == "aten::mm"]
        start, end, _ = ranges[4]
        assert sum(start <= at <= end for at in matmuls) > 20
        seconds.append({stage: (end - start) / 1e6 for start, end, stage in ranges})
    assert seconds[0] == pytest.approx({stage: rows[1][f"time/{stage}"] for stage in stages}, rel=0.05, abs=0.5)


@pytest.mark.parametrize("refit", ["merged", "adapter"])
def test_bfloat16_trains_and_continues_bit_for_bit(refit: str, tmp_path: Path) -> None:
    """Engine and trainer round alike but not the same: 40 steps show 2e-4 to 3e-3 nats a token, float32 2e-7."""
    whole = (f"rollout.refit={refit}", "trainer.max_steps=2", "trainer.save_every=1", "data.eval=null")
    run = finished(tmp_path / "run", *whole, config="tiny_cpu_bf16")
    for row in metrics(run):
        assert 1e-5 < row["rollout/logprob_mismatch"] < 1e-2
        assert row["optim/grad_norm"] > 0 and row["optim/skipped_steps"] == 0
    before, after = load_file(ROOT / "assets/demo_model/model.safetensors"), exported(run)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in after if not torch.equal(after[name], before[name].bfloat16())}
    assert changed == {name for name in after if "_proj." in name}
    assert_continues(run, 2, 1, tmp_path / "resumed", *whole, config="tiny_cpu_bf16")


def test_no_auxiliary_weight_is_grpo_bit_for_bit(tmp_path: Path) -> None:
    short = ("trainer.max_steps=2", "data.eval=null", "logging.tensorboard=false")
    zero = finished(tmp_path / "zero", "algorithm.lambda_0=0", *short)
    grpo = finished(tmp_path / "grpo", "algorithm=grpo", *short)
    assert list(map(repeatable, metrics(zero))) == list(map(repeatable, metrics(grpo)))
    for name, tensor in exported(zero).items():
        assert torch.equal(exported(grpo)[name], tensor), name


def test_opsd_distils_every_rollout_and_rewards_none(tmp_path: Path) -> None:
    short = ("trainer.max_steps=1", "data.eval=null", "logging.tensorboard=false", "trainer.export=false")
    (row,) = metrics(finished(tmp_path / "opsd", "algorithm=opsd", "rollout.group_size=1", *short))
    assert row["ssopd/pairs"] == 4
    assert row["loss/grpo"] == 0.0
    assert row["loss/total"] == pytest.approx(row["ssopd/loss"])
    assert row["optim/grad_norm"] > 0


def test_adapters_and_two_data_parallel_ranks(tmp_path: Path) -> None:
    run_dir = finished(
        tmp_path / "lora",
        "parallel=cpu_dp2",
        "lora.enabled=true",
        "lora.rank=8",
        "lora.alpha=16",
        "optimizer.lr=1e-2",
        "trainer.updates_per_step=2",
        "algorithm.reference_kl=0.01",
        "algorithm.refills=1",
        "algorithm.normalization=sequence",
        "algorithm.teacher=ema",
        "algorithm.divergence=jsd",
        "algorithm.contrast=0.2",
        "rollout.group_size=4",
        "trainer.max_steps=2",
        "data.eval=null",
    )
    rows = metrics(run_dir)
    assert all(row["rollout/logprob_mismatch_max"] < 1e-4 for row in rows)
    for row in rows:  # what a second draw brought is in the counts, and every pair has a second teacher
        draws = [json.loads(line) for file in run_dir.glob(f"rollouts/step_{row['step']:06}*") for line in open(file)]
        assert len(draws) == 4 * (4 + row["group/dropped_uniform"])
        assert row["ssopd/kl_contrast"] > 0
    assert rows[0]["loss/reference_kl"] < rows[1]["loss/reference_kl"]  # the adapters have left the reference
    before, after = load_file(ROOT / "assets/demo_model/model.safetensors"), exported(run_dir)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "_proj." in name}


def test_a_run_of_steps_that_are_not_finite_is_stopped(tmp_path: Path) -> None:
    """The penalty is exactly zero at the reference; one step away from it, this weight makes the gradient overflow."""
    result = train(tmp_path / "run", "algorithm.reference_kl=3e38", "trainer.max_steps=9", "data.eval=null")
    assert result.returncode != 0
    assert "the last 3 steps, up to 4, were skipped" in result.stdout + result.stderr
    assert [row["optim/skipped_steps"] for row in metrics(tmp_path / "run")] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.train={no_answer}",), "row 1: field 'answer' is missing"),
        (("model.path=nowhere",), "model.path='nowhere' has no config.json"),
    ],
)
def test_bad_input_is_one_clear_line(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    no_answer = tmp_path / "no_answer.jsonl"
    no_answer.write_text(json.dumps({"id": "1", "problem": "6*3"}) + "\n")
    result = train(tmp_path / "run", *(override.format(no_answer=no_answer) for override in overrides))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def evaluation(run_dir: Path, model: Path, *overrides: str) -> tuple[str, ...]:
    return (
        *("scripts/evaluate.py", "--config-name", "eval_demo", f"model={model}", f"run_dir={run_dir}"),
        *("evaluation.samples=2", "batch=4", *overrides),
    )


def test_an_evaluation_that_was_killed_continues_to_what_training_measured(run: Path, tmp_path: Path) -> None:
    """A run's newest adapters, merged; two data-parallel engines; SIGKILL half way. Against the run's own last step."""
    samples = tmp_path / "eval" / run.name / "products" / "samples.jsonl"
    arguments = evaluation(tmp_path / "eval", run, "parallel.world_size=2")
    with Command(*arguments) as command:
        while command.is_running() and not (samples.exists() and samples.stat().st_size):
            time.sleep(0.01)
        command.kill()
        assert command.leaves_nobody()
    written = samples.read_text()
    assert 0 < written.count("\n") < 120
    samples.write_text(written[:-9])  # as if the last line had been torn

    done = run_command(*arguments, "--resume")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"{written.count(chr(10)) // 2 - 1}/60 problems" in done.stdout
    assert samples.read_text() == (run / "eval" / "step_000004.jsonl").read_text()
    summary = json.loads(samples.with_name("summary.json").read_text())
    last = metrics(run)[-1]
    assert summary["avg_at_n"] == {
        "value": last["eval/avg_at_n"],
        "low": last["eval/avg_at_n_low"],
        "high": last["eval/avg_at_n_high"],
    }
    assert not (samples.parents[1] / ".hf").exists()  # the merged weights were for the engine only
    assert summary["title"] in (tmp_path / "eval" / "table.md").read_text()

    refused = run_command(*arguments, "--resume", "evaluation.top_k=5")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "evaluation.top_k was 0 and is 5 now" in refused.stderr
    assert samples.read_text() == (run / "eval" / "step_000004.jsonl").read_text()


def test_another_run_is_not_written_over(run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    result = train(run)
    assert result.returncode == 1
    assert "holds a run" in result.stderr and "trainer.resume=true" in result.stderr
    assert (run / "metrics.jsonl").read_text() == before
