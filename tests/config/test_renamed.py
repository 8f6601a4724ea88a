"""Settings under their former names, on the command line and in the configs of older runs."""

from __future__ import annotations

from dataclasses import fields

import pytest

from nemo_ssopd.config.compose import compose_run
from nemo_ssopd.config.evaluation import EvalConfig
from nemo_ssopd.config.renamed import RENAMED, read_old_sections, with_present_names
from nemo_ssopd.config.run import Config, from_hydra


def test_former_override_keys_set_the_present_fields() -> None:
    former = ["algorithm.clip=0.1", "algorithm.prefixes=9", "algorithm.clip_ratio_high=0.28", "optimizer.clip_grad=2"]
    config = from_hydra(compose_run("tiny_cpu", [*former, "algorithm.targets=every"]))
    algorithm = config.algorithm
    assert (algorithm.kl_clip, algorithm.prefix_tokens, algorithm.ratio_clip_high) == (0.1, 9, 0.28)
    assert (algorithm.distilled, config.optimizer.grad_clip) == ("every", 2.0)


def test_other_arguments_are_left_alone() -> None:
    arguments = ["--config-name", "tiny_cpu", "algorithm=grpo", "run_dir=a=b", "algorithm.clip_ratio_low.x=1"]
    assert with_present_names(arguments) == arguments


def test_present_names_are_fields() -> None:
    for name in RENAMED.values():
        section, _, field = name.rpartition(".")
        owner = getattr(Config(), section) if section else EvalConfig
        assert field in {each.name for each in fields(owner)}, name


def test_a_saved_config_of_an_older_run_is_read() -> None:
    saved: dict = {"rollout": {"tensor": 1, "group_size": 4}}
    assert read_old_sections(saved) == {"engine": {"tensor": 1}, "rollout": {"group_size": 4}}
    saved = {
        "run_dir": "runs/a",
        "algorithm": {"clip": 0.1, "clip_unit": "summand", "position_decay": 1.0, "name": "opsd"},
    }
    assert read_old_sections(saved) == {"run_dir": "runs/a", "algorithm": {"kl_clip": 0.1, "name": "opsd"}}


def test_a_saved_config_that_used_a_removed_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.position_decay=0\.9"):
        read_old_sections({"algorithm": {"position_decay": 0.9}})
