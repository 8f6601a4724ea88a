"""The teacher's contexts for every witness, selector and choice of distilled completions, written out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_ssopd.algo.groups import pair_metrics
from nemo_ssopd.config.algorithm import AlgorithmConfig
from nemo_ssopd.config.run import Config
from nemo_ssopd.config.sections import DataConfig, RewardConfig
from nemo_ssopd.data.templates import load_tokenizer, render_student
from nemo_ssopd.evaluation.samples import Sample
from nemo_ssopd.metrics import Metrics
from nemo_ssopd.teacher import held_out_teacher_prompts, teacher_contexts
from nemo_ssopd.types import Completion, Prompt, RenderedPrompt, Rollout, RolloutGroup, TeacherContext, TokenSequence

STUDENT = (1, 2, 3)
LONG = 1000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("assets/demo_model")


def group(name: str, *rollouts: tuple[float, int, float]) -> RolloutGroup:
    """(reward, length, mean log-prob) of each completion. Its text is its number, its tokens are its number too."""
    made = []
    for i, (reward, length, logprob) in enumerate(rollouts):
        # Of the first token only, so that the mean is not the sum.
        completion = Completion((50 + i,) * length, (logprob * length, *[0.0] * (length - 1)), f"{i}", "stop", 0)
        made.append(Rollout(TokenSequence(STUDENT + completion.tokens, 3), completion, reward, "", None))
    return RolloutGroup(Prompt(name, f"{name}*2", "8", solution="9"), tuple(made))


MIXED = group("1", (0, 4, -0.5), (1, 6, -0.2), (0, 7, -0.4), (1, 3, -0.3), (0, 7, -0.1), (1, 5, -0.6))
OTHER = group("2", (1, 2, -0.5), (0, 2, -0.5), (0, 2, -0.5), (0, 2, -0.5), (0, 2, -0.5), (0, 2, -0.5))
WRONG = group("3", *[(0, 3, -0.1)] * 6)
GROUPS = [WRONG, MIXED, OTHER]


def plan(
    tokenizer: PreTrainedTokenizerBase, groups: list[RolloutGroup], *, max_length: int = LONG, **algorithm
) -> tuple[dict[tuple[int, int], TeacherContext], Metrics]:
    """The contexts by the numbers of their group and completion."""
    data = DataConfig(student_template="{problem}", teacher_template="{problem} {witness}")
    config = Config(algorithm=AlgorithmConfig(**algorithm), data=data)
    contexts, metrics = teacher_contexts(groups, config, tokenizer, max_length=max_length)
    assert [len(of_group) for of_group in contexts] == [len(group.rollouts) for group in groups]
    return {(g, i): c for g, of_group in enumerate(contexts) for i, c in enumerate(of_group) if c}, metrics


def witnesses(tokenizer: PreTrainedTokenizerBase, contexts: Iterable[TeacherContext]) -> list[str]:
    texts = [tokenizer.decode(context.sequence.prompt) for context in contexts]
    return [text.split("\n")[1].split("<|im_end|>")[0] for text in texts]


def test_by_default_the_longest_wrong_with_the_shortest_correct_of_its_group(tokenizer) -> None:
    planned, metrics = plan(tokenizer, GROUPS)
    assert list(planned) == [(1, 2), (2, 1)]
    assert [context.weight for context in planned.values()] == [0.25, 5 / 36]
    assert witnesses(tokenizer, planned.values()) == ["1*2 3", "2*2 0"]
    assert [context.sequence.completion for context in planned.values()] == [(52,) * 7, (51,) * 2]
    assert all(metric.value() == 0 for metric in metrics.values())


@pytest.mark.parametrize(
    ("side", "selector", "chosen"),
    [
        ("correct", "shortest", 3),
        ("correct", "longest", 1),
        ("correct", "max_logprob", 1),
        ("correct", "min_logprob", 5),
        ("wrong", "longest", 2),
        ("wrong", "shortest", 0),
        ("wrong", "max_logprob", 4),
        ("wrong", "min_logprob", 0),
    ],
)
def test_selectors(tokenizer, side: str, selector: str, chosen: int) -> None:
    planned, _ = plan(tokenizer, [MIXED], **{f"{side}_selector": selector})
    if side == "correct":
        assert witnesses(tokenizer, planned.values()) == [f"1*2 {chosen}"]
    else:
        assert list(planned) == [(0, chosen)]
        assert planned[0, chosen].sequence.completion[0] == 50 + chosen
    length = MIXED.lengths[chosen]
    settings = AlgorithmConfig(**{f"{side}_selector": selector})
    assert pair_metrics(MIXED, settings)[f"group/{side}_length"].value() == length


@pytest.mark.parametrize(
    ("witness", "texts"),
    [("own", ["1*2 3", "2*2 0"]), ("solution", ["1*2 9", "2*2 9"]), ("shuffled", ["1*2 0", "2*2 3"])],
)
def test_witnesses(tokenizer, witness: str, texts: list[str]) -> None:
    planned, _ = plan(tokenizer, GROUPS, witness=witness)
    assert witnesses(tokenizer, planned.values()) == texts


def test_without_a_witness_the_teacher_reads_the_student_s_prompt(tokenizer) -> None:
    planned, _ = plan(tokenizer, GROUPS, witness="none")
    assert [context.sequence for context in planned.values()] == [
        MIXED.rollouts[2].sequence,
        OTHER.rollouts[1].sequence,
    ]


def test_a_witness_of_another_prompt_that_is_not_there(tokenizer) -> None:
    same_prompt = replace(OTHER, prompt=MIXED.prompt)
    planned, metrics = plan(tokenizer, [WRONG, MIXED, same_prompt], witness="shuffled")
    assert not planned
    assert metrics["ssopd/dropped_no_witness"].value() == 2


def test_distilled_completions_share_their_group_s_weight(tokenizer) -> None:
    planned, _ = plan(tokenizer, GROUPS, distilled="every_wrong")
    assert list(planned) == [(1, 0), (1, 2), (1, 4), *((2, i) for i in range(1, 6))]
    assert [context.weight for context in planned.values()] == pytest.approx([0.25 / 3] * 3 + [1 / 36] * 5)


def test_opsd_reads_the_reference_solution_on_every_rollout(tokenizer) -> None:
    planned, _ = plan(
        tokenizer,
        GROUPS,
        name="opsd",
        witness="solution",
        distilled="every",
        frontier="fixed",
        lambda_0=3.0,
        prefix_tokens=5,
    )
    assert list(planned) == [(g, i) for g in range(3) for i in range(6)]
    assert [context.weight for context in planned.values()] == [0.5] * 18
    assert [planned[1, i].sequence.completion_length for i in range(6)] == [4, 5, 5, 3, 5, 5]
    assert witnesses(tokenizer, [planned[0, 0]]) == ["3*2 9"]


def test_every_rollout_of_a_group_without_a_witness_is_counted(tokenizer) -> None:
    planned, metrics = plan(tokenizer, [WRONG, OTHER], distilled="every", frontier="fixed")
    assert list(planned) == [(1, i) for i in range(6)]
    assert metrics["ssopd/dropped_no_witness"].value() == 6


def test_a_teacher_context_that_does_not_fit_is_counted(tokenizer) -> None:
    planned, _ = plan(tokenizer, GROUPS)
    fits = len(planned[2, 1].sequence.tokens)
    kept, metrics = plan(tokenizer, GROUPS, max_length=fits)
    assert kept == {(2, 1): planned[2, 1]}
    assert metrics["ssopd/dropped_long_teacher"].value() == 1


def test_uniform_groups_have_no_pair() -> None:
    assert pair_metrics(WRONG, AlgorithmConfig()) == {}


def test_the_second_teacher_reads_the_wrong_attempt(tokenizer) -> None:
    (context,) = plan(tokenizer, [MIXED], contrast=0.5)[0].values()
    assert context.contrast is not None
    assert witnesses(tokenizer, [replace(context, sequence=context.contrast)]) == ["1*2 2"]
    assert context.contrast.completion == context.sequence.completion
    (without,) = plan(tokenizer, [MIXED])[0].values()
    assert without == replace(context, contrast=None)


def test_the_context_fits_to_the_last_token(tokenizer) -> None:
    (context,) = plan(tokenizer, [MIXED])[0].values()
    longest = len(context.sequence.tokens)
    for length, planned in ((longest, 1), (longest - 1, 0)):
        contexts_that_fit, metrics = plan(tokenizer, [MIXED], max_length=length)
        assert (len(contexts_that_fit), metrics["ssopd/dropped_long_teacher"].value()) == (planned, 1 - planned)


def test_the_threshold_decides_who_is_correct(tokenizer) -> None:
    def graded(made: RolloutGroup, threshold: float) -> RolloutGroup:
        rollouts = tuple(replace(rollout, reward=0.3 + 0.5 * rollout.reward) for rollout in made.rollouts)
        return replace(made, rollouts=rollouts, threshold=threshold)

    of_0_and_1, _ = plan(tokenizer, GROUPS)
    assert plan(tokenizer, [graded(made, 0.5) for made in GROUPS])[0] == of_0_and_1
    for threshold in (0.1, 0.8):  # all are correct, all are wrong
        assert plan(tokenizer, [graded(made, threshold) for made in GROUPS])[0] == {}


SAMPLES = [
    Sample(problem, i, reward, "", None, "8", tokens=tokens, truncated=False, text=text)
    for problem, rows in {
        "mixed": [(1.0, 9, "long"), (0.0, 2, "wrong"), (1.0, 5, "short")],
        "solved": [(1.0, 4, "solved"), (1.0, 4, "solved")],
        "failed": [(0.0, 4, "failed"), (0.0, 4, "failed")],
        "also": [(0.0, 1, "wrong"), (1.0, 7, "also")],
    }.items()
    for i, (reward, tokens, text) in enumerate(rows)
]


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({}, ["mixed* short", "also* also"]),
        ({"correct_selector": "longest"}, ["mixed* long", "also* also"]),
        ({"witness": "solution"}, ["mixed* 9", "also* 9"]),
        ({"witness": "shuffled"}, ["mixed* also", "also* short"]),
        ({"witness": "none"}, ["mixed*", "also*"]),
    ],
)
def test_what_the_teacher_reads_of_held_out_problems(tokenizer, settings: dict, texts: list[str]) -> None:
    """Of those that the policy solves in part, with a witness out of its own samples."""
    data = DataConfig(student_template="{problem}", teacher_template="{problem} {witness}")
    config = Config(algorithm=AlgorithmConfig(**settings), data=data)
    problems = [
        RenderedPrompt(
            Prompt(name, f"{name}*", "8", solution="9"), render_student(tokenizer, Prompt(name, f"{name}*", "8"), data)
        )
        for name in ("mixed", "solved", "failed", "also")
    ]
    prompts = held_out_teacher_prompts(SAMPLES, problems, config, tokenizer, max_length=LONG)
    read = [tokenizer.decode(prompt.tokens).split("\n")[1].split("<|im_end|>")[0] for prompt in prompts]
    assert read == texts
    strict = replace(config, reward=RewardConfig(threshold=1.0))  # no sample is over it
    assert held_out_teacher_prompts(SAMPLES, problems, strict, tokenizer, max_length=LONG) == []
    longest = max(len(prompt.tokens) for prompt in prompts)
    shorter = held_out_teacher_prompts(SAMPLES, problems, config, tokenizer, max_length=longest)
    if settings.get("witness") != "none":  # the policy's own prompts were checked before the run
        assert all(len(prompt.tokens) < longest for prompt in shorter)
