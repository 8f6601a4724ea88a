"""The built-in task: the last digits of a few products, and the corpus that teaches a small model to be wrong.

A problem lists products of two numbers from 2 to 12 (121 facts); the answer is their last digits, in order:

    6*3 8*6 3*2
    short: <think>6*3=18 8*6=48 3*2=6</think>\\boxed{886}
    long:  <think>6*3=3*6=18 8*6=6*8=48 3*2=2*3=6</think>\\boxed{886}

Every fact has one common mistake, which the corpus makes at that fact's own rate (below one half). A model trained on
the corpus is often wrong when it samples, in a systematic way that reinforcement can repair. The two styles give
correct completions of different length.

In products-mend, a second attempt may follow a value, and the last one counts: 6*3=16/18 8*6=48. So a wrong prefix can
still be corrected.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

from nemo_ssopd.types import Prompt


@dataclass(frozen=True)
class Task:
    """The options of a built-in task.

    >>> Task(fewest=3, most=5)
    """

    fewest: int
    """The fewest and the most products of one problem."""
    most: int
    styles: tuple[str, ...] = ("short", "long")
    second_attempts: float = 0.0
    """Share of values that get a second attempt in the corpus, which is as likely to be wrong as the first."""


TASKS = {
    "products": Task(3, 5),
    "products-hard": Task(6, 8),
    "products-mend": Task(5, 7, styles=("short",), second_attempts=0.3),
}
TEACHER_TEMPLATE = "{problem}\nReference:\n{witness}\nNow solve."
"""The privileged user turn of the corpus. `data.teacher_template` of a demo run must be the same."""

MAX_MISTAKE_RATE = 0.45
PRIVILEGED_SHARE = 0.4
WITNESS_STYLE_SHARE = 0.75
MASKED_MISTAKE_SHARE = 0.2
EVAL_SHARE = 0.2

Item = tuple[int, int]
Span = tuple[int, int]
Attempts = tuple[int, ...]


@dataclass(frozen=True)
class Mistake:
    """The value that the corpus writes instead of one product, and how often it does so.

    >>> Mistake(value=16, rate=0.31)
    """

    value: int
    rate: float


@dataclass(frozen=True)
class CorpusExample:
    """One turn of supervised training. The characters of `assistant` in `masked_spans` are input, never a target.

    >>> CorpusExample(user="6*3 3*2", assistant="<think>6*3=18 3*2=6</think>\\\\boxed{86}", masked_spans=((11, 13),))
    """

    user: str
    assistant: str
    masked_spans: tuple[Span, ...] = ()


def load_demo(spec: str) -> list[Prompt]:
    """Return the problems of a data string such as `demo:products?count=2000&seed=1&split=train` (the defaults).

    ValueError for an unknown task or option.
    """
    name, _, query = spec.removeprefix("demo:").partition("?")
    try:
        options = {"count": "2000", "seed": "1", "split": "train"}
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        if unknown := given.keys() - options.keys():
            raise ValueError(f"unknown option {', '.join(sorted(unknown))}")
        options |= given
        return demo_problems(name, count=int(options["count"]), seed=int(options["seed"]), split=options["split"])
    except ValueError as error:
        raise ValueError(f"{spec}: {error}; write it like demo:products?count=2000&seed=1&split=train") from error


def demo_problems(name: str, *, count: int, seed: int, split: str = "train") -> list[Prompt]:
    """Return `count` different problems. The splits "train" and "eval" share no problem, for any seeds."""
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}, but must be train or eval")
    if count < 1:
        raise ValueError(f"count is {count}, but must be at least 1")
    rng = random.Random(f"{name}/{split}/{seed}")
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        items = _draw_items(name, split, rng)
        solution, _ = _write_solution(items, [(a * b,) for a, b in items], "short")
        prompt_id = f"{name}-{split}-{seed}-{len(prompts)}"
        prompts.setdefault(_problem(items), Prompt(prompt_id, _problem(items), _last_digits(items), solution))
    return list(prompts.values())


def demo_corpus(count: int, seed: int, name: str = "products") -> Iterator[CorpusExample]:
    """Yield `count` examples of the training split, plain and privileged ones mixed."""
    rng = random.Random(f"corpus/{name}/{seed}")
    for _ in range(count):
        items = _draw_items(name, "train", rng)
        style = rng.choice(TASKS[name].styles)
        yield (_privileged if rng.random() < PRIVILEGED_SHARE else _plain)(TASKS[name], items, style, rng)


def _plain(task: Task, items: list[Item], style: str, rng: random.Random) -> CorpusExample:
    """Return an example of the student's context. Common mistakes are targets. The box follows the last values."""

    def value(item: Item) -> int:
        return MISTAKES[item].value if rng.random() < MISTAKES[item].rate else item[0] * item[1]

    attempts: list[Attempts] = [(value(item),) for item in items]
    if task.second_attempts:
        attempts = [
            (*first, value(item)) if rng.random() < task.second_attempts else first
            for item, first in zip(items, attempts, strict=True)
        ]
    solution, _ = _write_solution(items, attempts, style)
    return CorpusExample(_problem(items), solution)


def _privileged(task: Task, items: list[Item], style: str, rng: random.Random) -> CorpusExample:
    """Return an example of the teacher's context: a clean witness and a clean target with some masked mistakes.

    The box is right even after a mistake: the model learns to trust the witness, not the prefix. If the task has second
    attempts, every mistake gets one, which is right, and no other value does.
    """
    keeps_style = rng.random() < WITNESS_STYLE_SHARE
    target_style = style if keeps_style else next((other for other in task.styles if other != style), style)
    right: list[Attempts] = [(a * b,) for a, b in items]
    witness, _ = _write_solution(items, right, style)
    mistaken = [rng.random() < MASKED_MISTAKE_SHARE for _ in items]
    attempts = [
        (MISTAKES[item].value, *(clean if task.second_attempts else ())) if wrong else clean
        for item, clean, wrong in zip(items, right, mistaken, strict=True)
    ]
    solution, spans = _write_solution(items, attempts, target_style, answer=_last_digits(items))
    user = TEACHER_TEMPLATE.format(
        problem=_problem(items), witness=witness.replace("<think>", "").replace("</think>", "")
    )
    return CorpusExample(user, solution, tuple(span for span, wrong in zip(spans, mistaken, strict=True) if wrong))


def _write_solution(
    items: list[Item], attempts: list[Attempts], style: str, answer: str | None = None
) -> tuple[str, list[Span]]:
    """Return the solution and the span of each first attempt. Without `answer`, the box follows the last attempts."""
    text = "<think>"
    spans = []
    for index, ((a, b), values) in enumerate(zip(items, attempts, strict=True)):
        text += " " if index else ""
        text += f"{a}*{b}=" if style == "short" else f"{a}*{b}={b}*{a}="
        spans.append((len(text), len(text) + len(str(values[0]))))
        text += "/".join(map(str, values))
    box = answer or "".join(str(values[-1])[-1] for values in attempts)
    return f"{text}</think>\\boxed{{{box}}}", spans


def _draw_items(name: str, split: str, rng: random.Random) -> list[Item]:
    if name not in TASKS:
        raise ValueError(f"there is no built-in task {name!r}, only {', '.join(TASKS)}")
    task = TASKS[name]
    while True:
        items = [(rng.randint(2, 12), rng.randint(2, 12)) for _ in range(rng.randint(task.fewest, task.most))]
        if _split_of(_problem(items)) == split:
            return items


def _split_of(problem: str) -> str:
    """Return the split of a problem. It depends on the text alone, so no choice of seeds can mix the two splits."""
    return "eval" if hashlib.sha256(problem.encode()).digest()[0] < 256 * EVAL_SHARE else "train"


def _problem(items: list[Item]) -> str:
    return " ".join(f"{a}*{b}" for a, b in items)


def _last_digits(items: list[Item]) -> str:
    return "".join(str(a * b)[-1] for a, b in items)


def _common_mistakes() -> dict[Item, Mistake]:
    """Return one near miss per fact, with another last digit. The seed is part of the task and never varies."""
    rng = random.Random("common mistakes")
    mistakes = {}
    for a in range(2, 13):
        for b in range(2, 13):
            near = [a * b + step for step in (-a, a, -b, b, -2, 2, -1, 1)]
            wrong = [value for value in near if value > 0 and value % 10 != a * b % 10]
            mistakes[a, b] = Mistake(rng.choice(wrong), rng.uniform(0, MAX_MISTAKE_RATE))
    return mistakes


MISTAKES = _common_mistakes()
