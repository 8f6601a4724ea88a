import datetime
import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_ssopd.config.sections import DataConfig
from nemo_ssopd.data.prompts import PromptOrder, load_prompts
from nemo_ssopd.types import Prompt

DATA = DataConfig(train="unused")
SAMPLE = Path(__file__).parent / "math_sample.jsonl"


def write_jsonl(path, *rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
    )
    return str(path)


def test_the_shipped_sample():
    prompts = load_prompts(str(SAMPLE), DATA)
    assert len(prompts) == 40
    assert prompts[0] == Prompt(
        "gsm8k-test-462", "Ali had $21. Leila gave him half of her $100. How much does Ali have now?", "71"
    )


def test_fields_are_named_by_the_config_and_numbers_become_text(tmp_path):
    data = DataConfig(train="unused", problem_field="question", answer_field="target", solution_field="proof")
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"question": "1+1?", "target": 2, "proof": "one and one"},
        "\n",
        {"id": 9, "question": "½ of 5?", "target": 2.5},
        {"question": "7\u2028-3?", "target": 4.0},
    )
    assert load_prompts(path, data) == [
        Prompt("row-1", "1+1?", "2", "one and one"),
        Prompt("9", "½ of 5?", "2.5"),
        Prompt("row-4", "7\u2028-3?", "4"),
    ]


def test_gsm8k_answers_stand_behind_the_mark(tmp_path):
    data = DataConfig(train="unused", problem_field="question")
    answer = "There are 3*400=<<3*400=1200>>1200 eggs.\n#### 1,200"
    path = write_jsonl(tmp_path / "gsm8k.jsonl", {"question": "How many?", "answer": answer})
    assert load_prompts(path, data, need_solution=True) == [
        Prompt("row-1", "How many?", "1200", "There are 3*400=1200 eggs.\n\\boxed{1200}")
    ]


def test_a_parquet_file_reads_like_the_same_jsonl(tmp_path):
    rows = [{"id": "a", "problem": "p", "answer": 3}, {"id": "b", "problem": "q", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "good.parquet")
    assert load_prompts(str(tmp_path / "good.parquet"), DATA) == [Prompt("a", "p", "3")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet, row 2: field 'answer' is missing or empty"):
        load_prompts(str(tmp_path / "bad.parquet"), DATA)


def test_the_built_in_task_brings_solutions():
    prompts = load_prompts("demo:products?count=3&split=eval", DATA, need_solution=True)
    assert [prompt.solution is not None for prompt in prompts] == [True, True, True]


def test_for_a_reward_function_the_columns_are_kept_and_answers_are_optional(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"id": 3, "question": "1+1?", "answer": "one and one\n#### 2", "level": 4, "tests": [["1", None], {"a": 0.5}]},
        {"question": "2+2?", "level": 5},
        {"question": "3+3?", "answer": ["6", "six"]},
        {"question": "\u00bd?", "answer": " ", "nan": float("nan")},
    )
    first, second, third, fourth = load_prompts(path, DATA, for_function=True)
    assert first.row == {
        "id": "3",
        "problem": "1+1?",
        "answer": "2",  # what the run uses, where the file has a worked solution too
        "solution": "one and one\n\\boxed{2}",
        "question": "1+1?",
        "level": 4,
        "tests": [["1", None], {"a": 0.5}],
    }
    assert (second.answer, second.row["answer"], second.row["id"], second.row["level"]) == ("", "", "row-2", 5)
    assert (third.answer, third.row["answer"]) == ("", ["6", "six"])
    assert fourth.answer == "" and fourth.row["nan"] != fourth.row["nan"]
    first.row["level"] = 9  # the caller's own
    assert first.row["level"] == 4
    assert hash(first) != hash(second) and pickle.loads(pickle.dumps(first)) == first
    assert [prompt.columns for prompt in load_prompts(str(SAMPLE), DATA)] == [""] * 40
    assert load_prompts("demo:products?count=1", DATA, for_function=True)[0].row.keys() == {
        "id",
        "problem",
        "answer",
        "solution",
    }


def test_columns_that_json_cannot_express_are_left_out(tmp_path):
    rows = [{"problem": "p", "image": b"\x00", "when": datetime.date(2025, 1, 1), "scores": [1, 2], "price": 0.25}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    [prompt] = load_prompts(str(tmp_path / "a.parquet"), DATA, for_function=True)
    assert prompt.row == {
        "id": "row-1",
        "problem": "p",
        "answer": "",
        "solution": None,
        "scores": [1, 2],
        "price": 0.25,
    }


GOOD = {"problem": "p", "answer": "1"}


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ([], "the dataset is empty; give one"),
        (["\n", "\n"], "the dataset is empty; give one"),
        ([GOOD, {"problem": "p"}], "row 2: field 'answer' is missing or empty (the row has problem); fill it in"),
        ([{"problem": "p", "answer": " "}], "row 1: field 'answer' is missing or empty"),
        ([{"problem": "p", "answer": ["1"]}], "row 1: field 'answer' is a list; write it as text"),
        ([{"problem": "p", "answer": True}], "row 1: field 'answer' is a bool; write it as text"),
        ([{"problem": "p", "answer": "so #### "}], "row 1: field 'answer' has nothing behind ####"),
        ([{"riddle": "p", "answer": "1"}], "set data.problem_field to the field that holds it"),
        ([GOOD | {"id": "x"}, GOOD, GOOD | {"id": "x"}], "problems 1 and 3 share the id 'x'; make the ids unique"),
        ([GOOD, "{'problem': 1}\n"], "row 2: not JSON"),
        ([GOOD, "\n", "[1]\n"], "row 3: a list, not an object"),
    ],
)
def test_bad_rows_are_errors_that_say_where_and_what_to_do(tmp_path, rows, complaint):
    path = write_jsonl(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=re.escape(path) + ".*" + re.escape(complaint)):
        load_prompts(path, DATA)


def test_usual_field_names_are_found_and_others_named(tmp_path):
    rows = [{"ID": 1, "Question": "p", "final_answer": 3, "solution": "s"}]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    assert load_prompts(path, DATA) == [Prompt("row-1", "p", "3", "s")]
    path = write_jsonl(tmp_path / "b.jsonl", {"problem": "no", "riddle": "p", "answer": "no", "key": "1"})
    assert load_prompts(path, replace(DATA, problem_field="riddle", answer_field="key")) == [Prompt("row-1", "p", "1")]
    assert load_prompts(path, DATA) == [Prompt("row-1", "no", "no")]


def test_a_missing_solution_matters_only_when_it_is_needed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    assert load_prompts(path, DATA)[0].solution is None
    with pytest.raises(ValueError, match="row 1: field 'solution' is missing .* set data.solution_field"):
        load_prompts(path, DATA, need_solution=True)


def test_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: there is no such file; check data.train"):
        load_prompts("nowhere.jsonl", DATA)
    (tmp_path / "a.csv").write_text("problem,answer\n")
    with pytest.raises(ValueError, match=r"a.csv: only .jsonl and .parquet files are read; convert it"):
        load_prompts(str(tmp_path / "a.csv"), DATA)
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="a.parquet: not a readable parquet file"):
        load_prompts(str(tmp_path / "a.parquet"), DATA)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"some/name: cannot load split 'train' .* give the path of a .jsonl or .parquet"
    ):
        load_prompts("some/name", DATA)


def test_order_takes_every_problem_once_an_epoch():
    order = PromptOrder(num_prompts=10, seed=1)
    taken = [index for step in range(10) for index in order.indices(step, 3)]
    for epoch in range(3):
        assert sorted(taken[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert taken[:10] != taken[10:20] != taken[20:30]
    assert taken[:10] == [8, 5, 9, 0, 4, 2, 3, 1, 7, 6]


def test_order_is_a_pure_function_of_the_step():
    straight = [PromptOrder(7, seed=3).indices(step, 4) for step in range(20)]
    assert [PromptOrder(7, seed=3).indices(step, 4) for step in reversed(range(20))] == straight[::-1]
    assert [PromptOrder(7, seed=4).indices(step, 4) for step in range(20)] != straight
    assert PromptOrder(2, seed=3).indices(0, 5)[:4].count(0) == 2
    assert Counter(index for step in straight for index in step).most_common()[-1][1] >= 11
