"""The presets compose and say what the paper's evaluation was; what cannot work is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_ssopd.config.evaluation import EvalConfig, from_hydra
from nemo_ssopd.evaluation.data import load_sets

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "assets" / "demo_model"


def config(name: str, *overrides: str) -> EvalConfig:
    with initialize_config_dir(str(ROOT / "conf" / "eval"), version_base=None):
        return from_hydra(compose(name, list(overrides)))


def qwen3(folder: Path) -> Path:
    """A directory that looks like Qwen3 to every check."""
    fields = json.loads((DEMO_MODEL / "config.json").read_text()) | {"max_position_embeddings": 40960}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").touch()
    return folder


def test_eval_math_is_the_evaluation_of_the_paper(tmp_path: Path) -> None:
    paper = config("eval_math", f"model={qwen3(tmp_path / 'model')}")
    sampling = paper.evaluation
    assert (sampling.samples, sampling.temperature, sampling.top_p, sampling.top_k) == (12, 1.0, 0.95, 20)
    assert (sampling.min_p, sampling.max_new_tokens, paper.enable_thinking) == (0.0, 38912, True)
    assert r"\boxed{}" in paper.student_template
    assert {chosen.title: chosen.source for chosen in paper.chosen_sets.values()} == {
        "AIME 2024": "HuggingFaceH4/aime_2024",
        "AIME 2025": "yentinglin/aime_2025",
        "HMMT 2025": "MathArena/hmmt_feb_2025",
    }
    assert paper.models == {"model": str(tmp_path / "model")}
    assert paper.parallel.world_size == 1  # no GPU here


def test_models_and_sets_in_every_form(tmp_path: Path) -> None:
    first, second = qwen3(tmp_path / "a"), qwen3(tmp_path / "hf")
    problems = tmp_path / "mine.jsonl"
    problems.write_text(json.dumps({"question": "1+1", "answer": 2}) + "\n")
    several = config("eval_math", f"model=[{first},{second}]", f"data=[{problems},gsm8k]")
    assert list(several.models) == ["a", f"{tmp_path.name}-hf".replace("[", "_").replace("]", "_")]
    assert {name: (s.source, s.subset, s.split) for name, s in several.chosen_sets.items()} == {
        "mine": (str(problems), None, "train"),
        "gsm8k": ("openai/gsm8k", "main", "test"),
    }
    named = config("eval_math", f"model={{A:{first},B:{second}}}", "only=B", "sets.gsm8k.answer_field=final")
    assert named.models == {"B": str(second)}
    assert named.data_config(named.sets["gsm8k"]).answer_field == "final"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=nowhere"], "there is no directory nowhere: give a Hugging Face directory"),
        (["model=tests/data"], "tests/data is no model (it holds LICENSES.md"),
        (["model=[assets/demo_model,./assets/demo_model]"], "would both be called 'demo_model': give them names"),
        (["only=x"], "only='x' is none of the models demo_model"),
        (["data=[]"], "data is empty"),
        (["data=missing.jsonl"], "missing is read from missing.jsonl, which does not exist"),
        (["evaluation.samples=0"], "evaluation.samples=0: give a value at least 1"),
        (["evaluation.max_new_tokens=600"], "64 + 600 is over the 512 tokens of assets/demo_model: lower one"),
        (["engine.tensor=2"], "engine.tensor=2 does not divide parallel.tensor=1"),
        (["parallel.world_size=3", "parallel.tensor=3"], "parallel.tensor=3 does not divide the 4 query heads"),
        (["student_template=hello"], "student_template lacks {problem}"),
        (["reward.function=grade"], "reward.function='grade': write it as package.module:name"),
        (["reward.threshold=inf"], "reward.threshold=inf: give a value below inf"),
        (["run_dir=???"], "run_dir not set"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError) as error:
        config("eval_demo", *overrides)
    assert words in str(error.value)


def test_without_a_network_the_error_names_the_file_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as error:
        load_sets(config("eval_demo", "sets=math", "data=gsm8k"), DEMO_MODEL)
    assert "cannot load split 'test' from the Hugging Face hub" in str(error.value)
    assert "save the 'test' split of openai/gsm8k as a file" in str(error.value)
    assert "give sets.gsm8k.source=FILE.jsonl (or .parquet)" in str(error.value)
    local = tmp_path / "gsm8k.jsonl"
    local.write_text(json.dumps({"question": "6*3", "answer": "6*3=<<6*3=18>>18\n#### 1,018"}) + "\n")
    data = load_sets(config("eval_demo", "sets=math", "data=gsm8k", f"sets.gsm8k.source={local}"), DEMO_MODEL)
    assert [prompt.prompt.answer for prompt in data.sets["gsm8k"]] == ["1018"]


def test_with_a_reward_function_answers_are_optional_and_rows_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "6*3", "tests": [1, 2]}) + "\n")
    with pytest.raises(ValueError, match="field 'answer' is missing or empty"):
        load_sets(config("eval_demo", f"data={rows}"), DEMO_MODEL)
    data = load_sets(config("eval_demo", f"data={rows}", "reward.function=rewards:grade"), DEMO_MODEL)
    [prompt] = data.sets["rows"]
    assert prompt.prompt.row == {"id": "row-1", "problem": "6*3", "answer": "", "solution": None, "tests": [1, 2]}


def test_problems_that_cannot_be_asked_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"riddle": "6*3", "key": "8"}) + "\n")
    with pytest.raises(ValueError, match=r"the row has riddle, key\).* set problem_field to the field"):
        load_sets(config("eval_demo", f"data={rows}"), DEMO_MODEL)
    found = load_sets(config("eval_demo", f"data={rows}", "problem_field=riddle", "answer_field=key"), DEMO_MODEL)
    assert found.sets["rows"][0].prompt.problem == "6*3"
    rows.write_text(json.dumps({"problem": "1" * 99, "answer": "8"}) + "\n")
    with pytest.raises(ValueError, match="1 prompts of rows, 'row-1' among them, are over max_prompt_tokens=64"):
        load_sets(config("eval_demo", f"data={rows}"), DEMO_MODEL)
