"""Numbers that stop a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nemo_ssopd.config.run import Config, ModelConfig, TrainerConfig
from nemo_ssopd.metrics import Mean
from nemo_ssopd.run.alarms import UnhealthyRun, check_health, spike_limit


def test_a_spike_is_measured_against_the_largest_recent_norm() -> None:
    assert spike_limit([1.0] * 15, 10.0) == math.inf
    assert spike_limit([1.0] * 15 + [3.0], 10.0) == 30.0
    assert spike_limit([1.0] * 16, 0.0) == math.inf


def test_alarms_name_value_and_remedy() -> None:
    config = Config(model=ModelConfig(dtype="float32"))
    fine = {"rollout/logprob_mismatch": Mean(0.09, 1)}
    check_health(fine, config, step=3, skipped_in_a_row=2)
    check_health({}, config, step=3, skipped_in_a_row=0)  # SFT samples nothing
    bad = {"rollout/logprob_mismatch": Mean(0.22, 2)}
    with pytest.raises(UnhealthyRun, match=r"logprob_mismatch=1.10e-01 at step 3 is over trainer.max_logprob_mismatch"):
        check_health(bad, config, step=3, skipped_in_a_row=0)
    off, half = TrainerConfig(max_logprob_mismatch=0.0), ModelConfig(dtype="bfloat16")
    check_health(bad, replace(config, trainer=off), step=3, skipped_in_a_row=0)
    check_health(bad, replace(config, model=half), step=3, skipped_in_a_row=0)  # rounding alone is nearly that
    with pytest.raises(UnhealthyRun, match="the last 3 steps, up to 7, were skipped"):
        check_health(fine, config, step=7, skipped_in_a_row=3)
