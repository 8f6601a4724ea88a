"""Checkpoints of a run: written whole or not at all, verified by checksum, restored bit for bit, at any layout.

    state = load_checkpoint(policy, config)        # newest undamaged one of run_dir; LoopState() without any
    with CheckpointSaver(policy, config) as saver:
        saver.check()                             # at every step: raises the error of a failed background save
        saver.save(state, score)                  # run_dir/checkpoints/iter_0000100/

A checkpoint is a folder in Megatron-LM's layout: the tensors in Megatron-Core's distributed format (`torch_dist`),
`state.json`, the run's `config.yaml`, the base model's config and tokenizer in `hf/`, and `manifest.json` with a
checksum of every file. LoRA runs save the adapters, and a fingerprint of the base model that they belong to.
`docs/checkpoints.md` has the details; `saved_model.py` reads a checkpoint without its optimizer.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from omegaconf import OmegaConf

from nemo_ssopd.checkpoint.fingerprint import base_fingerprint
from nemo_ssopd.checkpoint.storage import (
    CheckpointError,
    Snapshot,
    checkpoints,
    damage,
    on_main,
    read_tensors,
    take_snapshot,
    write_checkpoint,
    write_tracker,
)
from nemo_ssopd.config.renamed import read_old_sections
from nemo_ssopd.config.run import Config
from nemo_ssopd.convert.bridge import extra_states, run_config
from nemo_ssopd.convert.exporting import copy_companions
from nemo_ssopd.megatron.policy import MegatronPolicy
from nemo_ssopd.megatron.runtime import Runtime
from nemo_ssopd.metrics import Metrics
from nemo_ssopd.models.family import read_hf_config
from nemo_ssopd.run.alarms import RECENT_STEPS

STATE, BEST = "state.json", "best_checkpointed_iteration.txt"
FORMAT = 1

# The only format that Megatron-Core has for the distributed optimizer that loads at every other layout. The moments are
# gathered in host memory on the first data-parallel rank.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopState:
    """The state of the training loop. Data order and sampling seeds follow from the step, so nothing else needs saving.

    >>> state = LoopState(step=99, tokens=5000)
    >>> state.after({"progress/tokens": Sum(70), "optim/skipped_steps": Max(0.0), "optim/grad_norm": Max(0.5)})
    LoopState(step=100, tokens=5070, skipped=0, skipped_in_a_row=0)
    """

    step: int = 0
    """Completed steps."""
    tokens: int = 0
    """Completion tokens trained on."""
    skipped: int = 0
    """Steps whose update was skipped: loss or gradient not finite, or the gradient norm over its limit."""
    skipped_in_a_row: int = 0
    recent_norms: Sequence[float] = field(default=(), compare=False, repr=False)
    """Gradient norms of the last steps that were not skipped."""

    def after(self, metrics: Metrics) -> LoopState:
        """Return the state after one more step, from that step's metrics over all ranks."""
        skipped = metrics["optim/skipped_steps"].value() > 0
        norms = self.recent_norms if skipped else [*self.recent_norms, metrics["optim/grad_norm"].value()]
        return LoopState(
            step=self.step + 1,
            tokens=self.tokens + int(metrics["progress/tokens"].value()),
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            recent_norms=norms[-RECENT_STEPS:],
        )


# ---- Saving ----------------------------------------------------------------------------------------------------------


class CheckpointSaver:
    """The writer of a run's checkpoints. All ranks call every method together.

    With trainer.async_save, `save` copies the state to host memory and returns; a thread on each rank writes the copy.
    A checkpoint appears in run_dir only once it is whole and sealed. As a context manager, the saver waits on exit for
    the last save.
    """

    def __init__(self, policy: MegatronPolicy, config: Config) -> None:
        self._actor, self._config = policy, config
        self._parent = Path(config.run_dir) / "checkpoints"
        self._runtime, self._thread = policy.runtime, None
        if config.trainer.async_save:
            # The thread's collectives must not mix with those of the training steps.
            self._runtime = replace(policy.runtime, cpu_group=dist.new_group(backend="gloo"))
            self._thread = ThreadPoolExecutor(
                max_workers=1, thread_name_prefix="checkpoint", initializer=policy.runtime.use_device
            )
        self._writing: Future[None] | None = None
        self._best: float | None = on_main(policy.runtime, lambda: best_score(self._parent))

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Finish a save that has begun, even when the loop ends with an error; the save's own error is then dropped."""
        if error_type is None:
            self.finish()
        elif self._thread is not None:
            self._thread.shutdown()

    def is_best(self, score: float | None) -> bool:
        """Tell whether a score is higher than all that trainer.keep_best has kept so far."""
        return score is not None and self._config.trainer.keep_best and (self._best is None or score > self._best)

    def save(self, state: LoopState, score: float | None = None) -> None:
        """Write run_dir/checkpoints/iter_STEP, then remove those that need not be kept. `score`: higher is better."""
        self.finish()
        if self.is_best(score):
            self._best = score
        sharded = _state_dict(self._actor, is_loading=False) | {
            "opt_param_scheduler": self._actor.scheduler.state_dict(),
            "iteration": state.step,
            "checkpoint_version": 3.0,
            "content_metadata": CONTENT,
        }
        if not self._config.lora.enabled and self._runtime.is_main:
            sharded["extra_states"] = extra_states(self._actor.hf)
        snapshot = take_snapshot(sharded, copy=self._thread is not None)
        if self._thread is None:
            self._write(snapshot, state, score)
        else:
            self._writing = self._thread.submit(self._write, snapshot, state, score)

    def check(self) -> None:
        """Raise the error of a failed background save, on all ranks at the same step."""
        if self._writing is None:
            return
        ended = torch.tensor(int(self._writing.done()))
        dist.all_reduce(ended, op=dist.ReduceOp.MIN, group=self._actor.runtime.cpu_group)
        if ended:
            self.finish()

    def finish(self) -> None:
        """Wait for the background save, and raise its error if it failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, snapshot: Snapshot, state: LoopState, score: float | None) -> None:
        final = self._parent / f"iter_{state.step:07}"
        try:
            write_checkpoint(
                final, snapshot, lambda folder: write_texts(folder, self._config, state, score), self._runtime
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"step {state.step} could not be saved under run_dir={self._config.run_dir!r}: {error}. Older "
                f"checkpoints are as they were: make room, or lower trainer.keep_checkpoints, and start again with "
                f"trainer.resume=true"
            ) from error
        if self._runtime.is_main:
            _remove_older(final, self._config)


def save_checkpoint(policy: MegatronPolicy, config: Config, state: LoopState, score: float | None = None) -> None:
    """Write one checkpoint; it is complete on return."""
    with CheckpointSaver(policy, config) as saver:
        saver.save(state, score)


def write_texts(folder: Path, config: Config, state: LoopState, score: float | None) -> None:
    """Write what is not a tensor: state, config, and the files of the Hugging Face directory other than weights."""
    about = {"format": FORMAT, "loop": asdict(state), "avg_at_n": score, "base": _base(config)}
    (folder / STATE).write_text(json.dumps(about, indent=2) + "\n")
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    if not config.lora.enabled:
        layout = run_config(read_hf_config(config.model.path), config.model)
        OmegaConf.save(OmegaConf.create(layout), folder / "run_config.yaml")
    (folder / "hf").mkdir()
    copy_companions(Path(config.model.path), folder / "hf")


def _base(config: Config) -> dict[str, str] | None:
    if not config.lora.enabled:
        return None
    return {"path": config.model.path, "fingerprint": base_fingerprint(config.model.path)}


def _remove_older(final: Path, config: Config) -> None:
    """Keep the newest trainer.keep_checkpoints and, with trainer.keep_best, the one with the best score."""
    kept = set()
    if config.trainer.keep_best and (best := _best(final.parent)):
        write_tracker(final.parent / BEST, best)
        kept = {best}
    older = [folder for folder in checkpoints(final.parent) if folder.name < final.name]
    if keep := config.trainer.keep_checkpoints:
        for folder in older[keep - 1 :]:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def best_score(parent: Path) -> float | None:
    """Return the highest score that a checkpoint in run_dir/checkpoints was saved with; None without any."""
    best = _best(parent)
    return _score(best) if best else None


def _best(parent: Path) -> Path | None:
    """Return the checkpoint with the highest score; of equal ones, the first."""
    scored = [(score, folder) for folder in reversed(checkpoints(parent)) if (score := _score(folder)) is not None]
    return max(scored, key=lambda each: each[0])[1] if scored else None


def _score(folder: Path) -> float | None:
    """Return a checkpoint's score; None also when state.json is damaged: such a checkpoint is never the best."""
    try:
        score = json.loads((folder / STATE).read_text())["avg_at_n"]
        return float(score) if score is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_checkpoint(policy: MegatronPolicy, config: Config) -> LoopState:
    """Restore weights, moments and schedule from the newest undamaged checkpoint of run_dir. All ranks call it.

    The optimizer's hyper-parameters are those of `config`, so that a run can resume with another learning rate.
    """
    runtime = policy.runtime
    folder = _newest_undamaged(Path(config.run_dir) / "checkpoints", runtime)
    if folder is None:
        return LoopState()
    about = read_about(folder, config.model.path, runtime)
    _check_same_kind(folder, saved_config(folder), config)
    loaded = read_tensors(_state_dict(policy, is_loading=True), folder)
    policy.model.load_state_dict(loaded["model"], strict=False)
    for name, average in policy.teacher_average.items():
        average.copy_(loaded["teacher_average"][name])
    _load_optimizer(policy.optimizer, loaded["optimizer"])
    policy.scheduler.num_steps = 0
    policy.scheduler.step(increment=loaded["opt_param_scheduler"]["num_steps"])
    return LoopState(**about["loop"])


def saved_config(checkpoint: Path) -> Config:
    """Read the config of the run that wrote a checkpoint."""
    values = read_old_sections(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(checkpoint / "config.yaml"))))
    sections = get_type_hints(Config)
    return Config(**{name: sections[name](**v) if isinstance(v, dict) else v for name, v in values.items()})


def saved_step(checkpoint: Path) -> int:
    """Return the completed steps of a checkpoint; 0 when nothing was trained, or not by this program."""
    state = checkpoint / STATE
    return int(json.loads(state.read_text())["loop"]["step"]) if state.is_file() else 0


def _newest_undamaged(parent: Path, runtime: Runtime) -> Path | None:
    names = on_main(runtime, lambda: [folder.name for folder in checkpoints(parent)])
    problems = []
    for name in names:
        problem = damage(parent / name, runtime)
        if problem is None:
            return parent / name
        problems.append(f"{parent / name} is damaged: {problem}")
        if runtime.is_main:
            logger.warning("%s; trying the one before", problems[-1])
    if problems:
        raise CheckpointError(
            f"no checkpoint can be read: {'; '.join(problems)}. Restore one from a backup, or set another run_dir"
        )
    return None


def read_about(folder: Path, base: str | Path, runtime: Runtime) -> dict[str, Any]:
    """Read state.json; ValueError unless its format is ours and `base` is the model the adapters were trained on."""
    about = cast(dict[str, Any], json.loads((folder / STATE).read_text()))
    if about["format"] != FORMAT:
        raise ValueError(
            f"{folder} has format {about['format']}, this version reads {FORMAT}: load it with the version it is of"
        )
    if about["base"] is not None:
        fingerprint = on_main(runtime, lambda: base_fingerprint(str(base)))
        if fingerprint != about["base"]["fingerprint"]:
            raise ValueError(
                f"the adapters in {folder} were trained on {about['base']['path']!r}, and model.path={str(base)!r} "
                f"holds other weights (fingerprint {fingerprint[:12]}, not {about['base']['fingerprint'][:12]}): "
                f"point model.path at that model"
            )
    return about


def _check_same_kind(folder: Path, saved: Config, config: Config) -> None:
    """Raise ValueError when an option that decides which tensors a checkpoint has is not as it was."""
    fields = {
        "lora.enabled": (saved.lora.enabled, config.lora.enabled),
        "lora.rank": (saved.lora.rank, config.lora.rank),
        "lora.alpha": (saved.lora.alpha, config.lora.alpha),
        "model.dtype": (saved.model.dtype, config.model.dtype),
        "algorithm.teacher": (saved.algorithm.teacher, config.algorithm.teacher),
        "optimizer.distributed": (saved.optimizer.distributed, config.optimizer.distributed),
    }
    for name, (before, now) in fields.items():
        if before != now:
            raise ValueError(
                f"{name}={now} but {folder} was written with {name}={before}: set that, or use another run_dir"
            )


# ---- Which tensors ---------------------------------------------------------------------------------------------------


def _state_dict(policy: MegatronPolicy, *, is_loading: bool) -> dict[str, Any]:
    """Return trained weights and optimizer state, by reference, with the place of each shard in its whole tensor."""
    _complete_moments(policy.optimizer)
    weights = trained_weights(policy.model)
    optimizer = policy.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(CONTENT))
    if optimizer.get("param_state", ...) is None:  # gathered on another rank
        del optimizer["param_state"]
    average = {name: _with_data(weights[name], tensor) for name, tensor in policy.teacher_average.items()}
    return {"model": weights, "optimizer": optimizer, "teacher_average": average}


def _with_data(weight: Any, average: torch.Tensor) -> Any:
    """Return a weight's place, or the factory of a fused projection's places, with the teacher's average as data."""
    dtype = {"dtype": average.dtype} if isinstance(weight, ShardedTensor) else {}
    return replace(weight, key=f"teacher_average.{weight.key}", data=average, **dtype)


def trained_weights(model: GPTModel, *, sharding: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the sharded adapters of a LoRA run, otherwise all sharded weights.

    FP8 scales, which modules would also save, as pickles, are left out: no run has any.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    sharded = model.sharded_state_dict(metadata=sharding)
    return {name: tensor for name, tensor in sharded.items() if name in trained}


def _complete_moments(optimizer: ChainedOptimizer) -> None:
    """Give Adam its moments now, as zeros; by itself, it would allocate the same zeros at its first step."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _inner(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return torch's part of an optimizer's state: with bf16 weights, it is one level down."""
    return cast(dict[str, Any], state_dict.get("optimizer", state_dict))


def _load_optimizer(optimizer: ChainedOptimizer, loaded: dict[str, Any]) -> None:
    """Load moments, step counts and float32 weights; hyper-parameters stay as they are.

    With torch's Adam, which is used on CPU, Megatron-Core leaves the step counts to us. Its distributed optimizer looks
    for a count in the saved state of each parameter and finds none. It then lets all parameters share one count, which
    each would increment. Its other optimizers do not save a count of 0.
    """
    (part,) = optimizer.chained_optimizers
    hyper_parameters = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in part.param_groups]
    if isinstance(part, DistributedOptimizer):
        moments = loaded.pop("param_state")
        part.load_state_dict(loaded)
        states = part.optimizer.state.values()
        steps = [state.pop("step", None) for state in states]
        part.load_parameter_state_from_fully_reshardable(moments)
        for state, step in zip(states, steps, strict=True):
            if step is not None:
                state["step"] = step.clone()
    else:
        if isinstance(part.optimizer, torch.optim.Adam):
            _inner(loaded)["state"].setdefault("common_step", torch.tensor(0.0))
        part.load_state_dict(loaded)
    for group, values in zip(part.param_groups, hyper_parameters, strict=True):
        group.update(values)
