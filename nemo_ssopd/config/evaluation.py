"""Settings of scripts/evaluate.py with their defaults, and every check that needs no GPU and no engine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from nemo_ssopd.config.checks import check_ranges, checked, require
from nemo_ssopd.config.compose import as_dataclasses, open_schema
from nemo_ssopd.config.run import check_tensor
from nemo_ssopd.config.sections import (
    DataConfig,
    Dtype,
    EngineConfig,
    EvaluationConfig,
    ParallelConfig,
    RewardConfig,
    VerifierConfig,
)
from nemo_ssopd.evaluation.models import ModelSource, find_model
from nemo_ssopd.models.family import read_hf_config


@dataclass  # not frozen: OmegaConf builds dict values from it and must be able to set their fields
class SetConfig:
    """A problem set that `data` may name. Null field names stand for the usual ones, such as problem and answer."""

    source: str = MISSING
    """A .jsonl or .parquet file, the name of a Hugging Face hub dataset, or demo:NAME?count=N&seed=S&split=eval."""
    title: str | None = None
    """The column's heading in the table; null takes the set's name."""
    subset: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset."""
    problem_field: str | None = None
    answer_field: str | None = None


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation: every model on every set."""

    model: Any = MISSING
    """PATH, [PATH, ...] or {NAME: PATH, ...}: Hugging Face, PEFT adapter, checkpoint or run directories. A NAME is the
    model's row in the table."""
    data: Any = MISSING
    """SET, [SET, ...]: names from `sets`, files, hub datasets or demo:NAME?..."""
    run_dir: str = MISSING
    """Folder of the results: run_dir/MODEL/SET/, and a table of everything that run_dir holds."""
    only: str | None = None
    """NAME of the only model to evaluate; the launcher sets it for the workers of each model."""
    resume: bool = False
    """Continue the evaluation in run_dir; finished sets stay as they are."""
    base: str | None = None
    """Path of the base model of an adapter or a LoRA checkpoint, if it has moved since that was written."""
    dtype: Dtype = Dtype.bfloat16
    trust_remote_code: bool = False
    """Let transformers run code from the model's folder."""
    max_prompt_tokens: int = checked(2048, at_least=1)
    """Longest prompt in tokens. A longer one is an error: leaving problems out would change the result."""
    batch: int = checked(0, at_least=0)
    """Problems between two writes, over all engines; a kill loses up to that many. 0 takes what fills the engines."""
    sets: dict[str, SetConfig] = field(default_factory=dict)
    problem_field: str | None = None
    """Field of the problem in sets that name none themselves; null tries the usual names."""
    answer_field: str | None = None
    student_template: str = DataConfig.student_template
    """The user turn; {problem} is replaced."""
    enable_thinking: bool = True
    """Passed to the chat template."""
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(world_size=0))
    """world_size 0 takes one process per visible GPU, or one CPU process."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(gpu_memory_utilization=0.9))
    reward: RewardConfig = field(default_factory=RewardConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def models(self) -> dict[str, str]:
        """Return name -> path of the models to evaluate."""
        if isinstance(self.model, Mapping):
            named = {str(name): str(path) for name, path in self.model.items()}
        else:
            paths = [self.model] if isinstance(self.model, str) else self.model
            named = _by_name("model", [(_model_name(str(path)), str(path)) for path in paths])
        if self.only is None:
            return named
        require(self.only in named, f"only={self.only!r} is none of the models {', '.join(named)}: give one of them")
        return {self.only: named[self.only]}

    @property
    def chosen_sets(self) -> dict[str, SetConfig]:
        """Return name -> set, in the order of the table's columns."""
        names = [self.data] if isinstance(self.data, str) else [str(name) for name in self.data]
        given = [(name, self.sets[name]) if name in self.sets else _set_from(name) for name in names]
        return _by_name("data", given)

    def data_config(self, chosen: SetConfig) -> DataConfig:
        """Return the settings by which `load_prompts` and `render_student` read a set."""
        return DataConfig(
            train=chosen.source,
            subset=chosen.subset,
            split=chosen.split,
            problem_field=chosen.problem_field or self.problem_field,
            answer_field=chosen.answer_field or self.answer_field,
            student_template=self.student_template,
            enable_thinking=self.enable_thinking,
        )


ConfigStore.instance().store(name="eval_schema", node=open_schema(EvalConfig))


def from_hydra(composed: DictConfig) -> EvalConfig:
    """Turn the composed tree into a checked config: ValueError names the field, the value and the remedy."""
    config = cast(EvalConfig, as_dataclasses(composed))
    if config.parallel.world_size == 0:
        config = replace(config, parallel=replace(config.parallel, world_size=_usual_world_size()))
    validate(config)
    return config


def _usual_world_size() -> int:
    """Return the number of processes that a launcher has started; else one per GPU, at least one."""
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if variable in os.environ:
            return int(os.environ[variable])
    return max(1, torch.cuda.device_count())


def validate(config: EvalConfig) -> None:
    """Check the config, the models' config.json and that the sets' files exist; ValueError says what to change."""
    check_ranges(config)
    config.reward.check()
    require("{problem}" in config.student_template, "student_template lacks {problem}: say where it goes")
    require(bool(config.models), "model is empty: name at least one")
    require(bool(config.chosen_sets), f"data is empty: name a file, or some of {', '.join(config.sets)}")
    for name, chosen in config.chosen_sets.items():
        if chosen.source.endswith((".jsonl", ".parquet")):
            require(Path(chosen.source).is_file(), f"data: {name} is read from {chosen.source}, which does not exist")
    for path in config.models.values():
        _check_fits(config, find_model(path, base=config.base))


def _check_fits(config: EvalConfig, source: ModelSource) -> None:
    hf = read_hf_config(source.architecture)
    check_tensor(config.parallel, hf, source.path)
    config.engine.tensor_in(config.parallel)
    prompt, new = config.max_prompt_tokens, config.evaluation.max_new_tokens
    require(
        prompt + new <= hf.max_position_embeddings,
        f"max_prompt_tokens + evaluation.max_new_tokens = {prompt} + {new} is over the "
        f"{hf.max_position_embeddings} tokens of {source.path}: lower one of them",
    )


def _by_name(field_name: str, given: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, _ in given:
        same = [value for other, value in given if other == name]
        require(
            len(same) == 1,
            f"{field_name}: {' and '.join(str(value) for value in same)} would both be called {name!r}: give "
            + ("them names, model={A:PATH,B:PATH}" if field_name == "model" else "each once, under another file name"),
        )
    return dict(given)


def _model_name(path: str) -> str:
    """Return a model's name from the telling parts of its path: runs/x/checkpoints/iter_0000100 is x-iter_0000100."""
    parts = [part for part in Path(path).resolve().parts if part != "checkpoints"]
    own = parts[-1]
    is_generic = own in ("hf", "adapter", "merged") or own.startswith("iter_")
    return re.sub(r"[^\w.-]+", "_", "-".join(parts[-2:] if is_generic else [own]))


def _set_from(source: str) -> tuple[str, SetConfig]:
    """Return name and settings of a set that is not in `sets`; the name comes from the file or the dataset."""
    if source.endswith((".jsonl", ".parquet")):
        return Path(source).stem, SetConfig(source=source)
    return re.sub(r"[^\w.-]+", "_", source.split("/")[-1] if ":" not in source else source), SetConfig(source=source)
