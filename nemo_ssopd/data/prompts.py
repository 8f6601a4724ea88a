"""Problems from the built-in task, a file or the Hugging Face hub, and the order in which a run takes them."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from nemo_ssopd.config.sections import DataConfig
from nemo_ssopd.data.demo import load_demo
from nemo_ssopd.types import Prompt

FINAL_ANSWER = "####"
"""The mark between the worked solution and the answer, which GSM8K keeps in one field."""
PROBLEM_FIELDS = ("problem", "question", "prompt", "input")
ANSWER_FIELDS = ("answer", "final_answer", "expected_answer", "ground_truth", "gold", "target")
"""Usual names of the two columns, tried in this order, in any letter case, if the config names no field."""


def load_prompts(
    source: str, data: DataConfig, *, need_solution: bool = False, for_function: bool = False
) -> list[Prompt]:
    """Return every problem of `source`: demo:NAME?..., a .jsonl or .parquet file, or the name of a hub dataset.

    ValueError for a row without a problem, an answer, or (if needed) a solution: nothing is dropped silently. With
    `for_function`, the user's reward function grades: the rows' columns are kept, and a row may have no answer.
    """
    if source.startswith("demo:"):
        return load_demo(source)
    rows = _load_rows(source, data)
    if not rows:
        raise ValueError(f"{source}: the dataset is empty; give one with at least one problem")
    columns = list(rows[0][1])
    data = replace(
        data,
        problem_field=data.problem_field or _usual_field(columns, PROBLEM_FIELDS),
        answer_field=data.answer_field or _usual_field(columns, ANSWER_FIELDS),
    )
    prompts = [
        _to_prompt(row, f"{source}, row {number}", number, data, need_solution, for_function) for number, row in rows
    ]
    _check_ids(source, prompts)
    return prompts


@dataclass(frozen=True)
class PromptOrder:
    """An endless seeded order of prompts, reshuffled in every epoch. It depends on the step alone, so it has no state.

    A step that spans two epochs may hold a problem twice.

    >>> order = PromptOrder(num_prompts=3, seed=1)
    >>> [order.indices(step, prompts_per_step=2) for step in range(3)]
    [[0, 1], [2, 2], [0, 1]]
    """

    num_prompts: int
    seed: int

    def indices(self, step: int, prompts_per_step: int) -> list[int]:
        first = step * prompts_per_step
        places = [divmod(place, self.num_prompts) for place in range(first, first + prompts_per_step)]
        return [_permutation(self.num_prompts, self.seed, epoch)[offset] for epoch, offset in places]


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _load_rows(source: str, data: DataConfig) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the rows with their numbers from 1. In a .jsonl file, the number is that of the line."""
    path = Path(source)
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise ValueError(f"{source}: there is no such file; check data.train and data.eval")
        return _read_jsonl(path) if path.suffix == ".jsonl" else list(enumerate(_read_parquet(path), 1))
    if path.exists():
        raise ValueError(f"{source}: only .jsonl and .parquet files are read; convert it to one of these")
    return list(enumerate(_load_hub(source, data.subset, data.split), 1))


def _read_jsonl(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number}: not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: a {type(row).__name__}, not an object; write one object per line")
        rows.append((number, row))
    return rows


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); write it again") from error


def _load_hub(name: str, subset: str | None, split: str) -> list[Mapping[str, Any]]:
    try:
        return list(datasets.load_dataset(name, subset, split=split))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: cannot load split {split!r} from the Hugging Face hub ({error}); correct the name or data.split, "
            f"or, without a network, give the path of a .jsonl or .parquet file with the same rows"
        ) from error


def _usual_field(columns: Sequence[str], usual: Sequence[str]) -> str:
    """Return the column with the first of the usual names. Without any, return that name, for the error of row 1."""
    found = {column.lower(): column for column in reversed(columns)}
    return next((found[name] for name in usual if name in found), usual[0])


def _to_prompt(
    row: Mapping[str, Any], place: str, number: int, data: DataConfig, need_solution: bool, for_function: bool
) -> Prompt:
    assert data.problem_field and data.answer_field
    problem = _text(row, data.problem_field, place, "data.problem_field")
    answer = ""
    if not for_function or _is_text(row.get(data.answer_field)):
        answer = _text(row, data.answer_field, place, "data.answer_field")
    worked, mark, final = answer.rpartition(FINAL_ANSWER)
    if mark:
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", final.strip())
        if not answer:
            raise ValueError(f"{place}: field {data.answer_field!r} has nothing behind {FINAL_ANSWER}; add the answer")
    solution = None
    if row.get(data.solution_field) is not None:
        solution = _text(row, data.solution_field, place, "data.solution_field")
    elif mark:
        solution = re.sub(r"<<[^<>]*>>", "", worked).strip() + f"\n\\boxed{{{answer}}}"
    elif need_solution:
        solution = _text(row, data.solution_field, place, "data.solution_field")
    prompt_id = str(row["id"]) if row.get("id") is not None else f"row-{number}"
    return Prompt(prompt_id, problem, answer, solution, _as_json(row) if for_function else "")


def _as_json(row: Mapping[str, Any]) -> str:
    """Return the columns that JSON can express. Dates, bytes and images are left out."""
    columns = {}
    for name, value in row.items():
        with contextlib.suppress(TypeError, ValueError):
            columns[name] = json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in columns.items()) + "}"


def _is_text(value: object) -> bool:
    """Tell whether a field holds text or a number, as `_text` takes them."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and bool(str(value).strip())


def _text(row: Mapping[str, Any], field: str, place: str, option: str) -> str:
    """Return a field as text, with numbers written out. ValueError for missing, null, blank and nested values."""
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(
            f"{place}: field {field!r} is missing or empty (the row has {', '.join(row)}); fill it in, remove the row, "
            f"or set {option} to the field that holds it"
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{place}: field {field!r} is a {type(value).__name__}; write it as text or a number")
    return str(value)


def _check_ids(source: str, prompts: list[Prompt]) -> None:
    first_row: dict[str, int] = {}
    for number, prompt in enumerate(prompts, 1):
        if prompt.id in first_row:
            raise ValueError(
                f"{source}: problems {first_row[prompt.id]} and {number} share the id {prompt.id!r}; make the ids "
                f"unique, or remove the field 'id' to have the rows numbered"
            )
        first_row[prompt.id] = number
