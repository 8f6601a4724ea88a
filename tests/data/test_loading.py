import json
import shutil
from pathlib import Path

import pytest

from nemo_ssopd.config.compose import as_dataclasses, compose_run
from nemo_ssopd.data.loading import load_data

DEMO = Path(__file__).parents[2] / "assets" / "demo_model"


def sft_run(tmp_path, context):
    """The demo model with another context, and three worked problems of 3, 40 and 400 digits."""
    model = tmp_path / "model"
    shutil.copytree(DEMO, model, dirs_exist_ok=True)
    hf = json.loads((DEMO / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(hf | {"max_position_embeddings": context}))
    rows = [{"problem": "1*1", "answer": "1", "solution": "1" * digits} for digits in (3, 40, 400)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    composed = compose_run(
        "tiny_cpu",
        [
            "algorithm=sft",
            f"model.path={model}",
            f"data.train={tmp_path}/train.jsonl",
            "data.eval=null",
            "rollout.max_prompt_tokens=16",
            "rollout.max_new_tokens=32",
            f"run_dir={tmp_path}/run",
        ],
    )
    return as_dataclasses(composed)


@pytest.mark.parametrize(("context", "kept"), [(512, [3, 40, 400]), (128, [3, 40])])
def test_worked_problems_over_the_context_are_left_out_and_counted(tmp_path, caplog, context, kept):
    data = load_data(sft_run(tmp_path, context))
    assert [len(prompt.solution) for prompt in data.supervised] == kept
    said = f"left out {3 - len(kept)} of 3 worked problems, over max_position_embeddings={context}"
    assert (said in caplog.text) == (len(kept) < 3)


def test_when_all_are_too_long_the_remedy_is_named(tmp_path):
    config = sft_run(tmp_path, 64)
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "1*1", "answer": "1", "solution": "1" * 99}) + "\n")
    with pytest.raises(
        ValueError, match="every one of its 1 worked problems is over max_position_embeddings=64; raise"
    ):
        load_data(config)
