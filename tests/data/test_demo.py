import re
import statistics

import pytest

from nemo_ssopd.data.demo import MISTAKES, TASKS, demo_corpus, demo_problems, load_demo


def last_digits_of(solution):
    """What the box should hold, read from the written values."""
    return "".join(value[-1] for value in re.findall(r"=(\d+)(?= |</think>)", solution))


def test_answers_and_solutions_by_independent_arithmetic():
    for name, task in TASKS.items():
        prompts = demo_problems(name, count=300, seed=3)
        assert {len(prompt.problem.split()) for prompt in prompts} == set(range(task.fewest, task.most + 1))
        for prompt in prompts:
            products = [eval(item) for item in prompt.problem.split()]
            assert prompt.answer == "".join(str(product % 10) for product in products)
            written = " ".join(
                f"{item}={product}" for item, product in zip(prompt.problem.split(), products, strict=True)
            )
            assert prompt.solution == f"<think>{written}</think>\\boxed{{{prompt.answer}}}"


def test_a_seed_names_the_same_problems_for_ever():
    first = demo_problems("products", count=3, seed=1)[0]
    assert (first.id, first.problem, first.answer) == ("products-train-1-0", "5*9 10*4 2*7", "504")
    assert demo_problems("products", count=3, seed=1) == demo_problems("products", count=30, seed=1)[:3]
    assert demo_problems("products", count=3, seed=1) != demo_problems("products", count=3, seed=2)


def test_train_and_eval_never_meet_whatever_the_seeds():
    def problems(split):
        return {
            prompt.problem
            for seed in range(3)
            for prompt in demo_problems("products", count=3000, seed=seed, split=split)
        }

    train, held_out = problems("train"), problems("eval")
    assert len(train) > 8500 and not train & held_out
    corpus = {example.user.split("\n")[0] for example in demo_corpus(3000, seed=0)}
    assert not corpus & held_out


def test_problems_and_ids_of_a_set_are_different():
    prompts = demo_problems("products", count=4000, seed=1)
    assert len({prompt.problem for prompt in prompts}) == len({prompt.id for prompt in prompts}) == 4000


def test_data_string():
    assert load_demo("demo:products") == demo_problems("products", count=2000, seed=1, split="train")
    spec = "demo:products-hard?count=5&seed=7&split=eval"
    assert load_demo(spec) == demo_problems("products-hard", count=5, seed=7, split="eval")


@pytest.mark.parametrize(
    "spec, complaint",
    [
        ("demo:sums", "no built-in task 'sums', only products, products-hard"),
        ("demo:products?size=3", "unknown option size"),
        ("demo:products?count=many", "'many'"),
        ("demo:products?count=0", "count is 0"),
        ("demo:products?split=test", "must be train or eval"),
        ("demo:products?count", "bad query field"),
    ],
)
def test_a_bad_data_string_says_what_is_wrong(spec, complaint):
    with pytest.raises(ValueError, match=re.escape(spec) + ".*" + re.escape(complaint)):
        load_demo(spec)


def test_mistakes_change_the_last_digit_and_stay_below_one_half():
    assert len(MISTAKES) == 121
    for (a, b), mistake in MISTAKES.items():
        assert mistake.value > 0 and mistake.value % 10 != a * b % 10
        assert 0 <= mistake.rate <= 0.45
    assert statistics.mean(mistake.rate for mistake in MISTAKES.values()) == pytest.approx(0.2201, abs=1e-4)


def test_plain_examples_make_each_mistake_at_its_own_rate():
    made, seen = dict.fromkeys(MISTAKES, 0), dict.fromkeys(MISTAKES, 0)
    for example in demo_corpus(20000, seed=5):
        if "Reference" in example.user:
            continue
        assert not example.masked_spans
        assert example.assistant.endswith(f"</think>\\boxed{{{last_digits_of(example.assistant)}}}")
        for item, value in re.findall(r"(\d+\*\d+)=(?:\d+\*\d+=)?(\d+)(?= |</think>)", example.assistant):
            a, b = map(int, item.split("*"))
            assert int(value) in (a * b, MISTAKES[a, b].value)
            seen[a, b] += 1
            made[a, b] += int(value) != a * b
    for fact, mistake in MISTAKES.items():
        assert made[fact] / seen[fact] == pytest.approx(mistake.rate, abs=0.1)


def test_privileged_examples_are_clean_where_they_are_targets():
    examples = list(demo_corpus(5000, seed=5))
    privileged = [example for example in examples if "Reference" in example.user]
    assert len(privileged) / 5000 == pytest.approx(0.4, abs=0.02)
    items = masked = same_style = 0
    for example in privileged:
        problem, _, witness, _ = example.user.split("\n")
        assert example.user == f"{problem}\nReference:\n{witness}\nNow solve."
        products = [eval(item) for item in problem.split()]
        answer = "".join(str(product % 10) for product in products)
        assert example.assistant.endswith(f"</think>\\boxed{{{answer}}}") and witness.endswith(f"\\boxed{{{answer}}}")
        thinking = example.assistant.removeprefix("<think>").split("</think>")[0]
        position = len("<think>")
        masked_values = list(example.masked_spans)
        for line, product in zip(thinking.split(" "), products, strict=True):
            value = line.split("=")[-1]
            end = position + len(line)
            if int(value) != product:
                assert masked_values.pop(0) == (end - len(value), end)
            position = end + 1
        assert not masked_values
        items += len(products)
        masked += len(example.masked_spans)
        same_style += (thinking.count("=") > len(products)) == (witness.count("=") > len(products))
    assert masked / items == pytest.approx(0.2, abs=0.02)
    assert same_style / len(privileged) == pytest.approx(0.75, abs=0.03)


def test_second_attempts_count_and_are_as_often_wrong_as_the_first():
    items = second = wrong = 0
    for example in demo_corpus(5000, seed=5, name="products-mend"):
        if "Reference" in example.user:
            continue
        lines = re.findall(r"(\d+)\*(\d+)=([\d/]+)(?= |</think>)", example.assistant)
        box = "".join(values[-1] for *_, values in lines)
        assert example.assistant.endswith(f"</think>\\boxed{{{box}}}")
        for a, b, values in lines:
            attempts = [int(value) for value in values.split("/")]
            assert set(attempts) <= {int(a) * int(b), MISTAKES[int(a), int(b)].value}
            items += 1
            second += len(attempts) - 1
            wrong += len(attempts) > 1 and attempts[1] != int(a) * int(b)
    assert second / items == pytest.approx(0.3, abs=0.01)
    assert wrong / second == pytest.approx(0.22, abs=0.01)


def test_a_privileged_example_mends_every_masked_mistake_and_nothing_else():
    for example in demo_corpus(2000, seed=5, name="products-mend"):
        if "Reference" not in example.user:
            continue
        masked = [example.assistant[start:end] for start, end in example.masked_spans]
        for a, b, values in re.findall(r"(\d+)\*(\d+)=([\d/]+)(?= |</think>)", example.assistant):
            first, *rest = values.split("/")
            right = str(int(a) * int(b))
            assert rest == ([] if first == right else [right])
            assert first == right or first == masked.pop(0)
        assert not masked
