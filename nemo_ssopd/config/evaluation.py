"""The settings of scripts/evaluate.py: their defaults, and every check that needs no GPU and no engine."""

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


@dataclass  # not frozen: OmegaConf makes the values of a dict from it, and could not fill them
class SetConfig:
    """A problem set that `data` may name. Fields left at null are found among the usual ones."""

    source: str = MISSING
    """A .jsonl or .parquet file, the name of a Hugging Face hub dataset, or demo:NAME?count=N&seed=S&split=eval."""
    title: str | None = None
    """The column's heading in the table; null takes the set's name."""
    subset: str | None = None
    """Of a hub dataset that has several."""
    split: str = "train"
    """Of a hub dataset."""
    problem_field: str | None = None
    answer_field: str | None = None


@dataclass(frozen=True)
class EvalConfig:
    """One call: every model on every set."""

    model: Any = MISSING
    """PATH, [PATH, ...] or {NAME: PATH, ...}: Hugging Face, PEFT adapter, checkpoint or run directories. A NAME is the
    model's row in the table."""
    data: Any = MISSING
    """SET, [SET, ...]: names from `sets`, files, hub datasets or demo:NAME?..."""
    run_dir: str = MISSING
    """Results go to run_dir/MODEL/SET/; the table, over all that run_dir holds, beside them."""
    only: str | None = None
    """The NAME of the one model to evaluate; the workers of each model are started with it."""
    resume: bool = False
    """Continue what run_dir holds; finished sets are left as they are."""
    base: str | None = None
    """The base model of an adapter or a LoRA checkpoint, where it is not at the path that was written down."""
    dtype: Dtype = Dtype.bfloat16
    trust_remote_code: bool = False
    """Whether transformers may run code found with the model."""
    max_prompt_tokens: int = checked(2048, at_least=1)
    """A longer prompt is an error: leaving problems out would change the result."""
    batch: int = checked(0, at_least=0)
    """Problems between two writes, over all engines: what a killed evaluation loses. 0 takes as many as fill them."""
    sets: dict[str, SetConfig] = field(default_factory=dict)
    problem_field: str | None = None
    """For sets that name none themselves; null finds the usual names."""
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
        """Name -> path."""
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
        """Name -> set, in the order of the table's columns."""
        names = [self.data] if isinstance(self.data, str) else [str(name) for name in self.data]
        given = [(name, self.sets[name]) if name in self.sets else _set_from(name) for name in names]
        return _by_name("data", given)

    def data_config(self, chosen: SetConfig) -> DataConfig:
        """How `load_prompts` and `render_student` are to treat a set."""
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
    """The composed tree as dataclasses, checked: ValueError names the field, the value and the remedy."""
    config = cast(EvalConfig, as_dataclasses(composed))
    if config.parallel.world_size == 0:
        config = replace(config, parallel=replace(config.parallel, world_size=_usual_world_size()))
    validate(config)
    return config


def _usual_world_size() -> int:
    """What a launcher has started; else one process per GPU, or one without any."""
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if variable in os.environ:
            return int(os.environ[variable])
    return max(1, torch.cuda.device_count())


def validate(config: EvalConfig) -> None:
    """Every check that needs nothing but the config, the models' config.json and the names of the sets' files."""
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
    """The last part of the path that says something: runs/x/checkpoints/iter_0000100 is x-iter_0000100."""
    parts = [part for part in Path(path).resolve().parts if part != "checkpoints"]
    own = parts[-1]
    is_generic = own in ("hf", "adapter", "merged") or own.startswith("iter_")
    return re.sub(r"[^\w.-]+", "_", "-".join(parts[-2:] if is_generic else [own]))


def _set_from(source: str) -> tuple[str, SetConfig]:
    """A set that is not in `sets`: its name comes from the file or the dataset."""
    if source.endswith((".jsonl", ".parquet")):
        return Path(source).stem, SetConfig(source=source)
    return re.sub(r"[^\w.-]+", "_", source.split("/")[-1] if ":" not in source else source), SetConfig(source=source)
