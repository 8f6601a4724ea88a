"""The string half of the recipe, without math-verify: fast and exact."""

import time

import pytest

from nemo_ssopd.rollout.answers import MAX_BOX_CHARS, aligned, canonical, decide, last_box


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed {42}", "42"),
        ("\\boxed\n{ 42\t}", "42"),
        (r"\boxed{7} ... no. \boxed{42}", "42"),
        (r"\boxed{42} and an unfinished \boxed{\frac{1}", "42"),
        (r"\boxed{42}. Final answer: 9", "42"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{\{41, 42\}}", r"\{41, 42\}"),
        (r"\boxed{a\\}b}", r"a\\"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{" + "1" * MAX_BOX_CHARS + "}", "1" * MAX_BOX_CHARS),
    ],
)
def test_last_balanced_box(completion: str, answer: str) -> None:
    assert last_box(completion) == (answer, "")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("The answer is 42.", "no_box"),
        (r"\boxed{}", "no_box"),
        (r"\boxed{42} Put it in \boxed{ }.", "no_box"),
        (r"\boxed 42", "no_box"),
        (r"\fbox{42}", "no_box"),
        (r"\boxed{42", "no_box"),
        (r"\boxed{42\}", "no_box"),
        ("", "no_box"),
        (r"\boxed{" + "1" * (MAX_BOX_CHARS + 1) + "}", "too_long"),
        (r"\boxed{" + "1" * 10_000_000, "too_long"),
    ],
)
def test_no_box(completion: str, reason: str) -> None:
    assert last_box(completion) == (None, reason)


@pytest.mark.parametrize("filler", ["x", "\\", "{", "}", "\\boxed{", "\\boxed ", "\\boxed{1}", " ", "\x00", "\ud800"])
def test_extraction_is_fast_on_ten_million_characters(filler: str) -> None:
    started = time.process_time()
    completion = filler * (10_000_000 // len(filler))
    last_box(completion + "\\boxed" + completion)
    assert last_box(completion + r" \boxed{42}")[0] == "42"
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (r"10,\!080", "10080"),
        (r"14{,}916", "14916"),
        (r"2\,304", "2304"),
        ("1,234,567", "1234567"),
        ("1 000", "1000"),
        ("32, 349", "32, 349"),  # a pair, not a number
        ("(3,4)", "(3, 4)"),
        (r"\left( 3, 4 \right)", "(3, 4)"),
        ("42.", "42"),
        ("42,", "42"),
        ("\u221242", "-42"),
        (r"\$18.50", "18.50"),
        ("$42$", "42"),
        (r"\sqrt10", r"\sqrt{10}"),
        (r"\frac2\pi", r"\frac{2}{\pi}"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\mathrm{e}", "e"),
        ("x^{2}", "x^2"),
        ("2 x + 3", "2 x+3"),
        ("90°", r"90^\circ"),
        (r"90\degree", r"90^\circ"),
        ("√2", r"\sqrt{2}"),
        ("2√(x+1)", r"2\sqrt{x+1}"),
        ("x² ≤ ∞", r"x^2\le\infty"),
        (r"\varnothing", r"\emptyset"),
        (r"3\colon 4", "3:4"),
        ("£5", "5"),
        ("5 dollars", "5"),
        (r"2\pi r", r"2\pi r"),
        (r"\text{Evelyn and Bob}", r"\text{Evelyn and Bob}"),
        (r"\frac{-1\pm\sqrt{17}}{2}", r"\{\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}\}"),
    ],
)
def test_canonical(side: str, expected: str) -> None:
    assert canonical(side) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("(-2, 1)", "1, -2", ("(-2, 1)", "(1, -2)")),
        ("1, -2", "(-2, 1)", ("(1, -2)", "(-2, 1)")),
        (r"\{-2, 1\}", "(1, -2)", ("(-2, 1)", "(1, -2)")),
        ("2, 1", "1, 2", None),  # two sets
        (r"\{2, 1\}", "1, 2", None),
        ("(2, 1)", "(1, 2)", None),
        ("[2, 1)", "1, 2", None),  # an interval
        ("(1, 2), (3, 4)", "(3, 4), (1, 2)", None),  # sets of pairs
        ("a=1, b=2", "(1, 2)", None),
        (r"f(1, 2)", "1, 2", None),
        ("(3)", "1, 2", None),
        ("1, 2)", "(1, 2)", None),
    ],
)
def test_a_bare_list_is_ordered_where_the_other_side_is(
    answer: str, gold: str, expected: tuple[str, str] | None
) -> None:
    assert aligned(answer, gold) == (expected or (answer, gold))


@pytest.mark.parametrize(
    ("answer", "gold", "reason"),
    [
        ("42", "42", "correct"),
        ("042", "42", "correct"),
        ("+42", "42", "correct"),
        ("41", "42", "wrong"),
        ("", "42", "wrong"),
        ("", "", "wrong"),
        ("9^{9^{9^9}}", "9^{9^{9^9}}", "correct"),  # equal spelling needs no arithmetic
        ("204_7", "204_5", "wrong"),
        ("1" * 5000, "42", "refused"),
        (r"\Gamma(10^7)", "1", "refused"),
        (r"\Gamma\left(123456\right)", "1", "refused"),
        ("42", "7" * 5000, "refused"),  # too long for int()
        ("\u0664\u0662", "42", ""),  # other scripts' digits are not integers here
        ("4\x002", "42", "refused"),
        ("4\u200b2", "42", "refused"),
        ("\ud800", "42", "refused"),
        ("(" * 17 + "42" + ")" * 17, "42", "refused"),
        ("|" * 17 + "x", "42", "refused"),
        ("2^{2^{2^2}}", "42", "refused"),
        ("2^3^4^5", "42", "refused"),
        ("2^{2^3}", "42", ""),
        ("2^{9^4}", "42", ""),
        ("1^{1^{999}}", "42", ""),
        ("2^{10^4}", "42", "refused"),
        ("10^{10^{10}}", "42", "refused"),
        ("10^{10^{10}}", "10^{10^{10}}", "correct"),
        ("(2^{(99^99)})", "42", "refused"),
        ("2^{x^2}+2^{y^2}", "42", ""),
        ("2^{100000}", "42", "refused"),
        ("2^{-100000}", "42", "refused"),
        ("1e999999999", "42", "refused"),
        ("2^{9999}", "42", ""),
        ("(20!)!", "42", "refused"),
        ("3!!", "42", "refused"),
        ("1000!", "42", "refused"),
        (r"2^{25}\cdot26!", r"2^{26}\cdot26!", ""),
        (r"\binom{1000000}{500000}", "42", "refused"),
        (r"\binom{10}{3}", "42", ""),
        (r"\sum_{k=1}^{5}k", "15", "refused"),
        (r"\sum_{k=1}^{5}k", r"\sum_{k=1}^{6}k", ""),
        (r"\int_0^1xdx", r"\sum_{k=1}^{6}k", "refused"),
        (r"\lim_{x\to0}x", "0", "refused"),
        (r"\lim_{x\to0}x", r"\limsup_{x\to0}x", "refused"),
        ("7" * 80, "42", "wrong"),
        ("x" + "7" * 80, "42", "refused"),
    ],
)
def test_decide(answer: str, gold: str, reason: str) -> None:
    assert decide(answer, gold) == reason
