"""Resume bit for bit, at other layouts, from damaged folders, from hostile ones, and after a disk that was full."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_ssopd.algo.losses import sft_loss
from nemo_ssopd.checkpoint import storage
from nemo_ssopd.checkpoint.checkpoint import CheckpointSaver, LoopState, load_checkpoint, save_checkpoint, saved_config
from nemo_ssopd.checkpoint.fingerprint import base_fingerprint
from nemo_ssopd.checkpoint.saved_model import load_policy, open_checkpoint, stream_policy
from nemo_ssopd.checkpoint.storage import CheckpointError, checkpoints, latest_checkpoint
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainerConfig,
)
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import Runtime, initialize
from nemo_ssopd.megatron.weights import hf_weights
from nemo_ssopd.metrics import Max, Sum
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.types import TokenSequence, TrainExample
from tests.distributed import run_distributed
from tests.megatron.hf_models import save_random_model

pytestmark = pytest.mark.heavy

ONE, TP2, DP2 = ParallelConfig(world_size=1), ParallelConfig(world_size=2, tensor=2), ParallelConfig(world_size=2)
LR, EMA_DECAY = 1e-2, 0.75
SAVED, LAST = 2, 4
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """What one rank saw: weights (Hugging Face names, adapters merged) and gradient norms, by completed steps."""

    start: LoopState
    weights: dict[int, Tensors]
    grad_norms: dict[int, float]
    folders: list[str]
    teachers: dict[int, Tensors]
    """The averaged teacher's weights."""


@dataclass(frozen=True)
class Run:
    """An uninterrupted run that saved at steps 0, 1 and 2, and went on to step 4."""

    config: Config
    ranks: list[Trained]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    path = save_random_model("qwen3_tied", folder)
    (folder / "tokenizer.json").write_text(json.dumps({"vocabulary": "x" * 2**20}))
    return path


# Parallel layout; adapters or all weights; optimizer distributed or not; dtype.
RUNS = {
    "tp2, adapters": (TP2, True, True, "float32"),
    "tp2, all weights, optimizer not distributed": (TP2, False, False, "float32"),
    "dp2, adapters": (DP2, True, True, "float32"),
    "dp2, all weights": (DP2, False, True, "float32"),
    "dp2, all weights, bfloat16": (DP2, False, True, "bfloat16"),
    "dp2, adapters, float16": (DP2, True, True, "float16"),
}


class Runs(dict[str, Run]):
    """By name; each is run when first asked for."""

    def __init__(self, base: str, folder: Path) -> None:
        self.base, self.folder = base, folder

    def __missing__(self, name: str) -> Run:
        parallel, lora, distributed, dtype = RUNS[name]
        config = Config(
            run_dir=str(self.folder / name),
            model=ModelConfig(path=self.base, dtype=dtype, recompute=False),
            lora=LoraConfig(enabled=lora, rank=4, alpha=8.0),
            parallel=parallel,
            algorithm=AlgorithmConfig(teacher="ema", ema_decay=EMA_DECAY),
            data=DataConfig(train="train.jsonl"),
            optimizer=OptimizerConfig(lr=LR, warmup_steps=3, distributed=distributed),
            trainer=TrainerConfig(keep_checkpoints=2),
        )
        self[name] = Run(config, run_distributed(train, parallel.world_size, config, (0, 1, SAVED)))
        return self[name]


@pytest.fixture(scope="module")
def runs(base: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("runs"))


# ---- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(runs: Runs, name: str) -> None:
    run = runs[name]
    resumed = run_distributed(resume, run.config.parallel.world_size, run.config, run.config.parallel)
    for whole, again in zip(run.ranks, resumed, strict=True):
        assert again.start == LoopState(step=SAVED, tokens=SAVED * 32)
        assert again.grad_norms == {step: whole.grad_norms[step] for step in (3, 4)}
        for step in (SAVED, 3, LAST):
            assert _difference(whole.weights[step], again.weights[step]) == 0.0
            assert _difference(whole.teachers[step], again.teachers[step]) == 0.0
        assert _difference(whole.weights[3], whole.weights[LAST]) > LR / 2, "each step moves the weights"


@pytest.mark.parametrize("name", ["tp2, all weights, optimizer not distributed", "dp2, all weights"])
def test_the_averaged_teacher_is_the_average(runs: Runs, name: str) -> None:
    for rank in runs[name].ranks:
        expected = rank.weights[0]
        for step in range(1, LAST + 1):
            expected = {n: EMA_DECAY * e + (1 - EMA_DECAY) * rank.weights[step][n] for n, e in expected.items()}
            assert _difference(expected, rank.teachers[step]) < 1e-6
        assert _difference(rank.teachers[LAST], rank.weights[LAST]) > LR / 2


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("tp2, adapters", ONE),
        ("tp2, all weights, optimizer not distributed", ONE),
        ("dp2, adapters", ONE),
        ("dp2, all weights", TP2),  # the vocabulary gains a padded row
    ],
)
def test_loads_at_another_layout(runs: Runs, name: str, parallel: ParallelConfig) -> None:
    """Weights exactly, the next steps to rounding: without the moments they would be off by about the learning rate."""
    whole = runs[name].ranks[0]
    for again in run_distributed(resume, parallel.world_size, runs[name].config, parallel):
        assert _difference(whole.weights[SAVED], again.weights[SAVED]) == 0.0
        assert _difference(whole.teachers[SAVED], again.teachers[SAVED]) == 0.0
        for step in (3, LAST):
            assert again.grad_norms[step] == pytest.approx(whole.grad_norms[step], rel=1e-4)
            assert _difference(whole.weights[step], again.weights[step]) < LR / 100


@pytest.mark.parametrize("name", ["tp2, adapters", "tp2, all weights, optimizer not distributed"])
def test_policy_without_optimizer(runs: Runs, name: str) -> None:
    (weights,) = run_distributed(policy_weights, 1, runs[name].config)
    assert _difference(runs[name].ranks[0].weights[SAVED], weights) == 0.0


def test_layout_on_disk(runs: Runs) -> None:
    for run in (runs[name] for name in RUNS):
        assert run.ranks[0].folders == ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]
        newest = latest_checkpoint(run.config.run_dir)
        assert newest is not None and newest.name == "iter_0000002"
        assert (newest.parent / "latest_checkpointed_iteration.txt").read_text() == "2"
        assert saved_config(newest) == run.config
        assert (newest / "hf" / "config.json").read_text() == (Path(run.config.model.path) / "config.json").read_text()
    adapters, everything = (_tensor_bytes(runs[name]) for name in ("dp2, adapters", "dp2, all weights"))
    assert adapters < everything


def test_nothing_saved_is_a_fresh_start_and_a_save_before_any_update_loads(runs: Runs, tmp_path: Path) -> None:
    distributed, plain = runs["dp2, adapters"].config, runs["tp2, all weights, optimizer not distributed"].config
    plain_bf16, plain_fp16 = (replace(plain, model=replace(plain.model, dtype=d)) for d in ("bfloat16", "float16"))
    for i, config in enumerate((distributed, plain, plain_bf16, plain_fp16)):
        config = replace(config, run_dir=str(tmp_path / str(i)))
        for fresh, loaded, difference in run_distributed(save_before_any_update, 2, config):
            assert fresh == LoopState()
            assert loaded == LoopState(step=3, tokens=7, skipped=3, skipped_in_a_row=3)
            assert difference == 0.0


@pytest.mark.parametrize("distributed", [True, False])
def test_the_loss_scale_survives(base: str, tmp_path: Path, distributed: bool) -> None:
    """Its value, and how far it is from growing: three steps are taken, one of them after an overflow."""
    config = Config(
        run_dir=str(tmp_path),
        model=ModelConfig(path=base, dtype="float16", recompute=False),
        lora=LoraConfig(rank=4, alpha=8.0),
        parallel=ONE,
        data=DataConfig(train="train.jsonl"),
        optimizer=OptimizerConfig(lr=LR, distributed=distributed),
    )
    [(state, saved, loaded, fresh)] = run_distributed(loss_scale_through_a_checkpoint, 1, config)
    assert state == LoopState(step=3, tokens=96, skipped=1, skipped_in_a_row=0)
    assert saved == loaded == (2.0**39, 2)
    assert fresh == (2.0**16, 0)


# ---- Damage ----------------------------------------------------------------------------------------------------------


def test_damaged_newest_falls_back_to_the_one_before(runs: Runs, tmp_path: Path) -> None:
    config = runs["tp2, adapters"].config
    damages = {
        "truncated": _truncate,
        "flipped": _flip_a_bit,
        "unlisted": _remove_manifest,
        "garbled": _garble_manifest,
    }
    damages["missing"] = lambda folder: (folder / "__1_0.distcp").unlink()
    folders = {}
    for name, damage in damages.items():
        folders[name] = shutil.copytree(config.run_dir, tmp_path / name)
        damage(folders[name] / "checkpoints" / "iter_0000002")
    _flip_a_bit(shutil.copytree(folders["flipped"], tmp_path / "both") / "checkpoints" / "iter_0000001")

    run_dirs = [str(tmp_path / name) for name in (*damages, "both")]
    results = run_distributed(load_each, 2, config, run_dirs)
    for (*fallen_back, nothing_left), _ in results:
        assert fallen_back == [LoopState(step=1, tokens=32)] * len(damages)
        assert isinstance(nothing_left, str)
        assert "CheckpointError" in nothing_left and "iter_0000001 is damaged: __0_0.distcp" in nothing_left
    said = [warnings for _, warnings in results]
    reasons = ("__0_0.distcp has", "another checksum", "No such file", "not a manifest", "__1_0.distcp is missing")
    for run_dir, reason, warning in zip(run_dirs, reasons, said[0], strict=False):
        assert run_dir in warning and reason in warning and "trying the one before" in warning
    assert len(said[0]) == len(damages) + 2 and said[1] == [], "rank 0 speaks for all"


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(runs: Runs, tmp_path: Path) -> None:
    run = runs["tp2, adapters"]
    config = replace(run.config, run_dir=str(shutil.copytree(run.config.run_dir, tmp_path / "run")))
    newest = Path(config.run_dir) / "checkpoints" / "iter_0000002"
    _flip_a_bit(newest)
    killed = newest.with_name(".iter_0000003.tmp")
    killed.mkdir()
    for rank, (state, again) in enumerate(run_distributed(step_again, 2, config)):
        assert state == LoopState(step=SAVED, tokens=SAVED * 32)
        assert _difference(run.ranks[rank].weights[SAVED], again) == 0.0
    assert not killed.exists()
    assert sorted(os.listdir(newest.parent)) == run.ranks[0].folders


@pytest.mark.parametrize("rank", [0, 1])
def test_full_disk_leaves_the_older_checkpoints(runs: Runs, tmp_path: Path, rank: int) -> None:
    """On rank 0 the copied tokenizer does not fit, on rank 1 its tensors do not."""
    config = replace(runs["tp2, adapters"].config, run_dir=str(tmp_path), trainer=TrainerConfig(keep_checkpoints=1))
    limit = {0: 2**19, 1: 2**12}[rank]
    for error, left, state in run_distributed(save_on_a_full_disk, 2, config, rank, limit):
        assert error.startswith(f"step 2 could not be saved under run_dir={str(tmp_path)!r}: rank {rank}: ")
        assert "File too large" in error and "make room" in error
        assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]
        assert state == LoopState(step=1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


# ---- In the background, and the best one -----------------------------------------------------------------------------


def test_a_save_in_the_background_is_of_the_moment_it_began(runs: Runs, tmp_path: Path) -> None:
    for name in ("tp2, adapters", "dp2, all weights, bfloat16", "tp2, all weights, optimizer not distributed"):
        config = replace(runs[name].config, run_dir=str(tmp_path / name), trainer=TrainerConfig(async_save=True))
        for saved, seen, loaded, grad_norms in run_distributed(save_in_the_background, 2, config):
            assert seen == []  # the thread had not written it yet
            assert _difference(saved, loaded) == 0.0
            assert grad_norms[0] == grad_norms[1], "the optimizer's state is that moment's too"


def test_the_background_thread_stays_on_its_own_gpu(tmp_path: Path) -> None:
    """torch's writer asks CUDA for the thread's stream, also for copies in host memory. New threads begin on GPU 0."""
    config = Config(
        run_dir=str(tmp_path),
        model=ModelConfig(path=""),
        data=DataConfig(train="train.jsonl"),
        trainer=TrainerConfig(async_save=True),
    )
    assert run_distributed(devices_in_the_background, 1, config) == [[("checkpoint_0", "cuda:3")]]


def test_an_error_in_the_background_comes_up_on_every_rank(runs: Runs, tmp_path: Path) -> None:
    config = replace(
        runs["tp2, adapters"].config, run_dir=str(tmp_path), trainer=TrainerConfig(async_save=True, keep_checkpoints=1)
    )
    for error, left in run_distributed(fail_in_the_background, 2, config):
        assert error.startswith(f"step 2 could not be saved under run_dir={str(tmp_path)!r}: rank 1: ")
        assert "File too large" in error
        assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_a_process_killed_during_a_background_save_leaves_the_one_before(runs: Runs, tmp_path: Path) -> None:
    config = replace(
        runs["tp2, adapters"].config, run_dir=str(tmp_path), parallel=ONE, trainer=TrainerConfig(async_save=True)
    )
    with pytest.raises(RuntimeError, match="died without a word"):
        run_distributed(die_in_the_background, 1, config)
    assert (tmp_path / "checkpoints" / ".iter_0000002.tmp").is_dir()
    [([state], _)] = run_distributed(load_each, 1, config, [str(tmp_path)])
    assert state == LoopState(step=1)


def test_the_best_checkpoint_is_kept_also_after_a_resume(runs: Runs, tmp_path: Path) -> None:
    config = replace(
        runs["tp2, adapters"].config, run_dir=str(tmp_path), parallel=ONE, trainer=TrainerConfig(keep_checkpoints=1)
    )
    [(first, is_best)] = run_distributed(save_with_scores, 1, config, {1: 0.5, 2: 0.8, 3: None, 4: 0.8})
    assert first == ["iter_0000002", "iter_0000004"]
    assert is_best == [True, True, False, False]
    [(second, is_best)] = run_distributed(save_with_scores, 1, config, {5: 0.7, 6: None})
    assert (second, is_best) == (["iter_0000002", "iter_0000006"], [False, False])
    assert (tmp_path / "checkpoints" / "best_checkpointed_iteration.txt").read_text() == "2"
    [(third, is_best)] = run_distributed(save_with_scores, 1, config, {7: 0.9, 8: None})
    assert (third, is_best) == (["iter_0000007", "iter_0000008"], [True, False])
    off = replace(config, trainer=TrainerConfig(keep_checkpoints=1, keep_best=False))
    assert run_distributed(save_with_scores, 1, off, {9: 1.0, 10: 0.0}) == [(["iter_0000010"], [False, False])]


# ---- What must be refused --------------------------------------------------------------------------------------------


def test_refuses_another_base_and_another_kind_of_run(runs: Runs, base: str, tmp_path: Path) -> None:
    config = runs["dp2, adapters"].config
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][5] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    moved = shutil.copytree(base, tmp_path / "moved")

    def refused(**changes: Any) -> str:
        [([outcome], _)] = run_distributed(load_each, 1, replace(config, parallel=ONE, **changes), [config.run_dir])
        return str(outcome)

    message = refused(model=replace(config.model, path=str(other)))
    assert "ValueError" in message and f"model.path={str(other)!r} holds other weights" in message and base in message
    assert "lora.rank=8 but" in refused(lora=replace(config.lora, rank=8))
    assert refused(model=replace(config.model, path=str(moved))) == str(LoopState(step=SAVED, tokens=64))


def test_fingerprint_is_of_values_not_of_files(base: str, tmp_path: Path) -> None:
    weights = load_file(Path(base) / "model.safetensors") | {"large": torch.randn(1024, 1024)}
    names = sorted(weights)

    def fingerprint(folder: str, parts: list[list[str]], values: Tensors) -> str:
        (tmp_path / folder).mkdir()
        for i, part in enumerate(parts):
            save_file({name: values[name] for name in part}, tmp_path / folder / f"model-{i}.safetensors")
        return base_fingerprint(str(tmp_path / folder))

    whole = fingerprint("whole", [names], weights)
    assert fingerprint("cut", [names[:5], names[5:]], weights) == whole
    trained = fingerprint("trained", [names], weights | {"large": weights["large"] * 1.001})
    renamed = fingerprint("renamed", [names[:-1] + ["other"]], weights | {"other": weights[names[-1]]})
    assert len({whole, trained, renamed}) == 3


class _Attack:
    """Unpickling it makes a file: what a hostile checkpoint would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_pickles_in_a_checkpoint_are_not_executed(runs: Runs, tmp_path: Path) -> None:
    """Their checksums are right: a manifest shows damage, and is no signature."""
    config = runs["dp2, adapters"].config
    mark = tmp_path / "executed"
    attacks = {"index": _attack_index, "common": _attack_common, "entry": _attack_entry, "outside": _point_outside}
    for name, attack in attacks.items():
        newest = shutil.copytree(config.run_dir, tmp_path / name) / "checkpoints" / "iter_0000002"
        attack(newest, mark)
        _renew_manifest(newest)

    run_dirs = [str(tmp_path / name) for name in attacks]
    [(outcomes, _)] = run_distributed(load_each, 1, replace(config, parallel=ONE), run_dirs)
    index, common, entry, outside = map(str, outcomes)
    assert "ValueError" in index and f"it names {os.mkdir.__module__}.mkdir" in index
    assert "ValueError" in common and "common.pt is not data only" in common
    assert "ValueError" in entry and "has no tensor" in entry
    assert "ValueError" in outside and "points outside its folder" in outside
    assert not mark.exists()
    with open(tmp_path / "index" / "checkpoints" / "iter_0000002" / ".metadata", "rb") as file:
        pickle.load(file)  # the attack is a real one
    assert mark.exists()


def test_state_after_a_step() -> None:
    state = LoopState(step=7, tokens=100, skipped=1, skipped_in_a_row=1)
    skipped = state.after({"progress/tokens": Sum(5), "optim/skipped_steps": Max(1.0)})
    assert skipped == LoopState(step=8, tokens=105, skipped=2, skipped_in_a_row=2)
    assert skipped.recent_norms == ()  # of a skipped step, none counts
    good = skipped.after({"progress/tokens": Sum(5), "optim/skipped_steps": Max(0.0), "optim/grad_norm": Max(0.5)})
    assert good == LoopState(9, 110, 2, 0)
    assert good.recent_norms == [0.5]


# ---- What the ranks run ----------------------------------------------------------------------------------------------


def train(config: Config, save_at: tuple[int, ...]) -> Trained:
    actor = _actor(config, initialize(config.parallel, seed=1))
    return _train(actor, config, LoopState(), save_at)


def loss_scale_through_a_checkpoint(config: Config) -> tuple[LoopState, tuple, tuple, tuple]:
    """(Scale, steps since it changed) when saved, when loaded, and of an actor that is new."""
    runtime = initialize(config.parallel, seed=1)
    actor, again, state = _actor(config, runtime), _actor(config, runtime), LoopState()
    fresh = _loss_scale(again)
    _scaler(actor)._scale.fill_(2.0**40)  # a float16 gradient overflows
    state, _ = _update(actor, state)
    _scaler(actor)._scale.fill_(2.0**16)
    for _ in range(2):
        state, _ = _update(actor, state)
    _scaler(actor)._scale.fill_(2.0**39)
    save_checkpoint(actor, config, state)
    assert load_checkpoint(again, config) == state
    return state, _loss_scale(actor), _loss_scale(again), fresh


def _scaler(actor: MegatronPolicy) -> Any:
    return actor.optimizer.chained_optimizers[0].grad_scaler


def _loss_scale(actor: MegatronPolicy) -> tuple[float, int]:
    return _scaler(actor).scale.item(), _scaler(actor)._growth_tracker


def resume(config: Config, parallel: ParallelConfig) -> Trained:
    actor = _actor(replace(config, parallel=parallel), initialize(parallel, seed=1))
    return _train(actor, config, load_checkpoint(actor, config), ())


def step_again(config: Config) -> tuple[LoopState, Tensors]:
    """Falls back to step 1, trains and saves step 2; what a third actor then loads."""
    runtime = initialize(config.parallel, seed=1)
    actor = _actor(config, runtime)
    save_checkpoint(actor, config, _update(actor, load_checkpoint(actor, config))[0])
    again = _actor(config, runtime)
    return load_checkpoint(again, config), _weights(again)


def save_before_any_update(config: Config) -> tuple[LoopState, LoopState, float]:
    runtime = initialize(config.parallel, seed=1)
    actor, again = _actor(config, runtime), _actor(config, runtime)
    fresh = load_checkpoint(actor, config)
    save_checkpoint(actor, config, LoopState(step=3, tokens=7, skipped=3, skipped_in_a_row=3))
    loaded = load_checkpoint(again, config)
    for each in (actor, again):
        _update(each, LoopState())
    return fresh, loaded, _difference(_weights(actor), _weights(again))


def save_on_a_full_disk(config: Config, full_rank: int, limit: int) -> tuple[str, list[str], LoopState]:
    """The error of the second save, what is left then, and what loads; a third save finds room again."""
    runtime = initialize(config.parallel, seed=1)
    actor = _actor(config, runtime)
    save_checkpoint(actor, config, LoopState(step=1))
    with _file_size_limit(limit if runtime.rank == full_rank else resource.RLIM_INFINITY):
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(actor, config, LoopState(step=2))
    left = sorted(os.listdir(Path(config.run_dir) / "checkpoints"))
    state = load_checkpoint(actor, config)
    save_checkpoint(actor, config, LoopState(step=3))
    return str(error.value), left, state


def save_in_the_background(config: Config) -> tuple[Tensors, list[str], Tensors, list[float]]:
    """Weights at the save, checkpoints seen right after it, weights that load, and the norms of the step after both."""
    actor = _actor(config, initialize(config.parallel, seed=1))
    state, _ = _update(actor, LoopState())
    saved, parent = _weights(actor), Path(config.run_dir) / "checkpoints"
    with CheckpointSaver(actor, config) as saver, _held_back() as write:
        saver.save(state)
        _, grad_norm = _update(actor, state)
        saver.check()
        seen = [folder.name for folder in checkpoints(parent)]
        write.set()
    assert load_checkpoint(actor, config) == state
    loaded = _weights(actor)
    return saved, seen, loaded, [grad_norm, _update(actor, state)[1]]


def devices_in_the_background(config: Config) -> list[tuple[str, str]]:
    """By thread, for the fourth of a node's processes on GPUs that are not there."""
    runtime = replace(initialize(ONE, seed=1), device=torch.device("cuda", 3))
    actor: Any = SimpleNamespace(runtime=runtime)
    chosen: list[tuple[str, str]] = []
    torch.cuda.set_device = lambda device: chosen.append((threading.current_thread().name, str(device)))
    with CheckpointSaver(actor, config) as saver:
        assert saver._thread is not None
        saver._thread.submit(int).result()
    return chosen


def fail_in_the_background(config: Config) -> tuple[str, list[str]]:
    runtime = initialize(config.parallel, seed=1)
    actor = _actor(config, runtime)
    with pytest.raises(CheckpointError) as error, CheckpointSaver(actor, config) as saver:
        saver.save(LoopState(step=1))
        saver.finish()
        with _file_size_limit(2**12 if runtime.rank == 1 else resource.RLIM_INFINITY):
            saver.save(LoopState(step=2))
            while True:  # the steps of a training run
                saver.check()
    return str(error.value), sorted(os.listdir(Path(config.run_dir) / "checkpoints"))


def die_in_the_background(config: Config) -> None:
    actor = _actor(config, initialize(ONE, seed=1))
    saver = CheckpointSaver(actor, config)
    saver.save(LoopState(step=1))
    saver.finish()
    with _held_back():
        saver.save(LoopState(step=2))
        while not (Path(config.run_dir) / "checkpoints" / ".iter_0000002.tmp").is_dir():
            time.sleep(0.01)
        os._exit(1)


def save_with_scores(config: Config, scores: dict[int, float | None]) -> tuple[list[str], list[bool]]:
    actor = _actor(config, initialize(ONE, seed=1))
    is_best = []
    with CheckpointSaver(actor, config) as saver:
        for step, score in scores.items():
            is_best.append(saver.is_best(score))
            saver.save(LoopState(step=step), score)
    return sorted(folder.name for folder in checkpoints(Path(config.run_dir) / "checkpoints")), is_best


@contextmanager
def _held_back() -> Iterator[threading.Event]:
    """Tensors are written only once the event is set."""
    write, event = storage._write_tensors, threading.Event()

    def wait_and_write(*arguments: Any) -> None:
        event.wait()
        write(*arguments)

    storage._write_tensors = wait_and_write
    yield event
    storage._write_tensors = write


def load_each(config: Config, run_dirs: list[str]) -> tuple[list[LoopState | str], list[str]]:
    """The state that each gives, or the error; and the warnings on the way."""
    actor = _actor(config, initialize(config.parallel, seed=1))
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_ssopd.checkpoint.checkpoint").addHandler(handler)
    outcomes: list[LoopState | str] = []
    for run_dir in run_dirs:
        try:
            outcomes.append(load_checkpoint(actor, replace(config, run_dir=run_dir)))
        except (ValueError, CheckpointError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes, warnings


def policy_weights(config: Config) -> Tensors:
    runtime = initialize(ONE, seed=1)
    newest = latest_checkpoint(config.run_dir)
    assert newest is not None
    saved = open_checkpoint(newest, runtime)
    streamed = {name: tensor.clone() for name, tensor in stream_policy(saved, ONE, runtime)}
    whole = dict(hf_weights(load_policy(saved, ONE, runtime), saved.hf, runtime))
    assert _difference(streamed, whole) == 0.0
    return streamed


def _actor(config: Config, runtime: Runtime) -> MegatronPolicy:
    return MegatronPolicy(config, read_hf_config(config.model.path), runtime, pad_id=0)


def _train(actor: MegatronPolicy, config: Config, start: LoopState, save_at: tuple[int, ...]) -> Trained:
    state, weights, grad_norms = start, {start.step: _weights(actor)}, {}
    teachers = {start.step: _teacher(actor)}
    while True:
        if state.step in save_at:
            save_checkpoint(actor, config, state)
        if state.step == LAST:
            break
        state, grad_norms[state.step] = _update(actor, state)
        weights[state.step], teachers[state.step] = _weights(actor), _teacher(actor)
    return Trained(start, weights, grad_norms, sorted(os.listdir(Path(config.run_dir) / "checkpoints")), teachers)


def _update(actor: MegatronPolicy, state: LoopState) -> tuple[LoopState, float]:
    """Four sequences, the same for every layout: 8 targets each."""
    runtime = actor.runtime
    tokens = torch.randint(96, (4, 12), generator=torch.Generator().manual_seed(state.step))
    rows = tokens[runtime.layout.data.rank :: runtime.layout.data.size].tolist()
    examples = [TrainExample(TokenSequence(tuple(row), 4), (1.0,) * 8, group=i) for i, row in enumerate(rows)]
    result = actor.update(examples, sft_loss)
    after = state.after(result.metrics | {"progress/tokens": Sum(32)})
    return after, result.metrics["optim/grad_norm"].value()


def _weights(actor: MegatronPolicy) -> Tensors:
    return {name: tensor.clone() for name, tensor in actor.weights()}


def _teacher(actor: MegatronPolicy) -> Tensors:
    with actor.teacher():
        return _weights(actor)


def _difference(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@contextmanager
def _file_size_limit(limit: int) -> Iterator[None]:
    """What the kernel then says to a longer file is the same as on a full disk, but for the errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- What is done to checkpoints -------------------------------------------------------------------------------------


def _tensor_bytes(run: Run) -> int:
    return sum(
        file.stat().st_size for file in (Path(run.config.run_dir) / "checkpoints" / "iter_0000002").glob("*.distcp")
    )


def _truncate(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size // 2)


def _flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def _renew_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _attack_index(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Attack(mark)))


def _attack_common(folder: Path, mark: Path) -> None:
    torch.save(torch.load(folder / "common.pt") | {"iteration": _Attack(mark)}, folder / "common.pt")


def _attack_entry(folder: Path, mark: Path) -> None:
    """A tensor's entry becomes one of the kind that torch unpickles, and its bytes the pickle."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    key = "decoder.layers.mlp.linear_fc1.lora_up.A"
    shape = index.state_dict_metadata[key].size
    index.state_dict_metadata[key] = BytesStorageMetadata()
    index.state_dict_metadata[key].size = shape
    payload = io.BytesIO()
    torch.save(_Attack(mark), payload)
    (folder / "__0_0.distcp").write_bytes(payload.getvalue())
    for place, entry in index.storage_data.items():
        if place.fqn == key:
            entry.relative_path, entry.offset, entry.length = "__0_0.distcp", 0, len(payload.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _point_outside(folder: Path, mark: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    for entry in index.storage_data.values():
        entry.relative_path = f"../{folder.name}/{entry.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
