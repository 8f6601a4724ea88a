"""Compare one boxed answer with a gold answer: string code first, math-verify for what string code cannot decide.

`last_box`, `canonical` and `decide` are linear in the text, import nothing heavy, and settle most answers in the
trainer. `math_verify_task` imports math-verify and runs in grading workers only. `docs/verifier.md` explains the recipe
and its limits.
"""

import logging
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

MAX_BOX_CHARS = 512
BOX_TRIES = 16  # occurrences of `\boxed` to examine, from the last one back
MAX_NESTING = 16
MAX_POWER_NESTING = 2
MAX_DIGIT_RUN = 79
MAX_FACTORIALS = 8
PARSED_SIDES = 256  # parsed answers that a math-verify process caches

# ------------------------------------------------------------------------------------------------ extraction


def last_box(text: str) -> tuple[str | None, str]:
    r"""Return the content of the last balanced `\boxed{...}` and "", or None and the reason why there is none.

    >>> last_box(r"so \boxed{7}, no: \boxed {\frac{1}{2}} and then \boxed{")
    ('\\frac{1}{2}', '')
    >>> last_box("the answer is 42")
    (None, 'no_box')
    """
    reason = "no_box"
    end = len(text)
    for _ in range(BOX_TRIES):
        start = text.rfind("\\boxed", 0, end)
        if start < 0:
            break
        end = start
        window = text[start + len("\\boxed") : start + len("\\boxed") + MAX_BOX_CHARS + 16].lstrip()
        if not window.startswith("{"):
            continue
        close = _closing_brace(window)
        if close is None or close - 1 > MAX_BOX_CHARS:
            if len(window) > MAX_BOX_CHARS:
                reason = "too_long"
            continue
        inside = window[1:close].strip(" \t\r\n\u00a0")
        return (inside, "") if inside else (None, "no_box")
    return None, reason


def _closing_brace(text: str) -> int | None:
    """Return the index of the brace that closes `text[0]`. A backslash escapes the character after it."""
    depth, index = 0, 0
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return None


# ------------------------------------------------------------------------------------------------ canonical form

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "²": "^2"}
    | {"³": "^3", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∅": r"\emptyset "}
    | dict.fromkeys("£€¥", "")
    | dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " ")
)
_REWRITES = [
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right)(?![a-zA-Z.])", ""),
        (r"\\(?:displaystyle|textstyle)(?![a-zA-Z])|\\?\$", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\degree(?![a-zA-Z])", r"^\\circ "),
        (r"\\colon(?![a-zA-Z])|\\text\{:\}", ":"),
        (r"√\s*(?:([0-9]+|[a-zA-Z])|\(([^()]*)\))", r"\\sqrt{\1\2}"),
        (r"(?<=[0-9])\s*(?:\\ )?dollars?\s*$", ""),
        (r"\\(?:mathrm|text|rm)\s*\{\s*(e|i)\s*\}", r"\1"),
        (r"(?<=[0-9])(?:,\s*\\!|\{,\}|\\[,;: ])\s*(?=[0-9]{3}(?![0-9]))", ""),  # 10,\!080 and 10{,}080 and 2\,304
        (r"\\!", ""),
        (r"\\sqrt\s*([0-9]+)", r"\\sqrt{\1}"),
        (r"\\frac\s*([0-9])\s*(?:([0-9])|(\\[a-zA-Z]+))", r"\\frac{\1}{\2\3}"),
        (r"([_^])\{([0-9a-zA-Z])\}", r"\1\2"),
    ]
]
# A space means nothing unless it separates two words or two numbers. Every comma gets one after it, which keeps the
# pair "32, 349" apart from the number "32,349".
_SPACES = re.compile(r"\s*,\s*|(?<![0-9a-zA-Z\\\s])\s+|\s+(?![0-9a-zA-Z\s])", re.ASCII)
_GROUPED_NUMBER = re.compile(r"[-+]?[0-9]{1,3}([, ])[0-9]{3}(?:\1[0-9]{3})*(?:\.[0-9]+)?")
_INTEGER = re.compile(r"[-+]?[0-9]{1,512}")
_IN_BASE = re.compile(r"[0-9a-zA-Z]+_(?:[0-9]|\{[0-9]+\})")
_NOT_A_VALUE = re.compile(r"[,;=<>]|\\(?:mp|text|in|le|ge|or|and)")


def canonical(side: str) -> str:
    r"""Return one spelling for answers that differ only in typesetting. Rewrite forms that math-verify misreads.

    >>> [canonical(side) for side in (r"10,\!080", r"\dfrac2\pi", r"\left( 3,4 \right).", r"\frac{1\pm x}{2}")]
    ['10080', '\\frac{2}{\\pi}', '(3, 4)', '\\{\\frac{1+x}{2}, \\frac{1-x}{2}\\}']
    """
    text = side.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    while text and text[-1] in ".,;" and not text.endswith("\\" + text[-1]):
        text = text[:-1].rstrip()
    if _GROUPED_NUMBER.fullmatch(text):
        return text.replace(",", "").replace(" ", "")
    text = _SPACES.sub(lambda match: ", " if "," in match[0] else "", text)
    if text.count(r"\pm") == 1 and not _NOT_A_VALUE.search(text):
        before, after = text.split(r"\pm")
        return rf"\{{{before}+{after.lstrip()}, {before}-{after.lstrip()}\}}"
    return text


def aligned(answer: str, gold: str) -> tuple[str, str]:
    r"""Return both canonical sides. If one is a tuple and the other a list or a set, return both as tuples.

    math-verify reads a bare list as a set, and finds a set equal to a tuple in any order.

    >>> aligned("(-2, 1)", "1, -2"), aligned("2, 1", r"\{1, 2\}")
    (('(-2, 1)', '(1, -2)'), ('2, 1', '\\{1, 2\\}'))
    """
    if _is_tuple(answer):
        return answer, _as_tuple(gold)
    return (_as_tuple(answer), gold) if _is_tuple(gold) else (answer, gold)


def _is_tuple(side: str) -> bool:
    return side.startswith("(") and side.endswith(")") and _is_bare_list(side[1:-1])


def _as_tuple(side: str) -> str:
    inside = side[2:-2] if side.startswith(r"\{") and side.endswith(r"\}") else side
    return f"({inside})" if _is_bare_list(inside) else side


def _is_bare_list(side: str) -> bool:
    """Tell whether the side holds values separated by commas outside all brackets."""
    if "," not in side or _NOT_A_VALUE.search(side.replace(",", "")):
        return False
    depth, commas = 0, 0
    for character in side:
        depth += (character in "([{") - (character in ")]}")
        commas += character == "," and depth == 0
        if depth < 0:
            return False
    return commas > 0 and depth == 0


# ------------------------------------------------------------------------------------------------ decision


def decide(answer: str, gold: str) -> str:
    """Return the verdict of string code on two canonical sides, or "" when only sympy can tell.

    >>> decide("042", "42"), decide("41", "42"), decide("9^{9^{9^9}}", "42"), decide("0.5", "1/2")
    ('correct', 'wrong', 'refused', '')
    """
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in answer):
        return "refused"
    if not answer:
        return "wrong"
    if answer == gold:
        return "correct"
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return "correct" if int(answer) == int(gold) else "wrong"
    if _IN_BASE.fullmatch(answer) and _IN_BASE.fullmatch(gold):
        return "wrong"  # math-verify ignores the base: 204_7 would equal 204_5
    if is_dangerous(answer) or is_dangerous(gold) or _operators(answer) - _operators(gold):
        return "refused"
    return ""


def _operators(side: str) -> set[str]:
    r"""Return the operators (\int, \sum, \prod, \lim) by which sympy would solve a problem that is merely restated."""
    return set(re.findall(r"\\(?:i*int|oint|sum|prod|coprod|lim(?:sup|inf)?)(?![a-zA-Z])", side))


_DIGIT_RUN = re.compile(rf"[0-9]{{{MAX_DIGIT_RUN + 1},}}")
_HUGE_EXPONENT = re.compile(r"(?:\^[\s{(]*[-+]?[\s{(]*|[0-9]\s*[eE]\s*[-+]?)[0-9]{5,}")
_TOWER = re.compile(r"\^[\s{(]*([0-9]{1,79})[\s})]*\^[\s{(]*([0-9]{1,79})")
_HUGE_FACTORIAL = re.compile(r"[0-9]{4,}[\s)}\]]*!|![\s)}\]]*!")
_HUGE_GAMMA = re.compile(r"\\Gamma\s*(?:\\left)?\s*[({]?[^(){}]*(?:[0-9]{4,}|\^)")
_HUGE_BINOMIAL = re.compile(r"\\[dt]?binom\s*(?:\{[^{}]*\})?\s*\{?[^{}]*[0-9]{4,}")


def is_dangerous(side: str) -> bool:
    """Tell whether the side has a form that costs sympy seconds or gigabytes and that no answer key uses."""
    factorials = side.count("!") + side.count("binom")
    return (
        len(side) > 2 * MAX_BOX_CHARS
        or _nesting(side) > MAX_NESTING
        or _power_nesting(side) > MAX_POWER_NESTING
        or bool(_DIGIT_RUN.search(side))
        or bool(_HUGE_EXPONENT.search(side))
        or any(_has_five_digits(int(base), int(power)) for base, power in _TOWER.findall(side))
        or bool(_HUGE_FACTORIAL.search(side))
        or bool(_HUGE_GAMMA.search(side))
        or bool(_HUGE_BINOMIAL.search(side))
        or factorials > MAX_FACTORIALS
        or (factorials > 0 and _power_nesting(side) > 1)
    )


def _has_five_digits(base: int, power: int) -> bool:
    """Tell whether base^power, an exponent itself, is 10 000 or more."""
    return base > 1 and (power >= 14 or base**power >= 10_000)


def _nesting(side: str) -> int:
    depth, deepest = 0, side.count("|")  # only sympy's parser can tell, at great cost, whether a bar opens or closes
    for character in side:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest


def _power_nesting(side: str) -> int:
    """Return the depth of nested exponents: 1 for x^2, 2 for 2^{3^4} and for 2^3^4."""
    deepest = 0
    open_powers: list[int] = []  # brace depth at which each enclosing exponent opened
    depth, chain = 0, 0
    for index, character in enumerate(side):
        if character == "{":
            depth += 1
            if index and side[index - 1] == "^":
                open_powers.append(depth)
        elif character == "}":
            if open_powers and open_powers[-1] == depth:
                open_powers.pop()
            depth -= 1
        elif character == "^":
            chain = chain + 1 if re.search(r"\^\s*[0-9a-zA-Z]$", side[max(0, index - 4) : index]) else 1
            deepest = max(deepest, len(open_powers) + chain)
    return deepest


# ------------------------------------------------------------------------------------------------ math-verify

_WARM_UP = [
    r"\frac{1}{2}+\sqrt{3}\pi", r"(1,2)", r"\left[\frac{\pi^2}{8},\infty\right)", r"x^2-3x+1=0", r"\{1,2\}", r"28\%",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\text{Evelyn}", r"1\pm\sqrt{2}", r"90^\circ", r"x\le 5", r"10!", "a,b",
    r"(-\infty,2)\cup(3,4)", r"0.25", r"2^{10}\cdot 3", r"x\in[-2,7]", r"|x|", r"\binom{5}{2}", r"\sin x", "4210_5",
]  # fmt: skip


def _math_verify() -> Callable[[str, str], bool]:
    """Import math-verify (one second, 50 MB: not in the trainer). Return the comparison of an answer with a gold."""
    from latex2sympy2_extended.latex2sympy2 import PSParser  # noqa: PLC0415
    from math_verify import LatexExtractionConfig, parse, verify  # noqa: PLC0415
    from sympy.core.random import seed  # noqa: PLC0415

    logging.disable(logging.CRITICAL)
    seed(0)
    # With antlr4 4.9 the grammar lacks this method, and every percent answer fails. With 4.13 the grammar has it.
    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda self: None
    latex_only = [LatexExtractionConfig(boxed_match_priority=0)]  # the expression extractor would take embedded numbers

    @lru_cache(PARSED_SIDES)
    def parsed(side: str) -> list[Any]:
        # Without a box, "8\sqrt{10}" parses as 8. Its own timeouts are disabled: they use SIGALRM and can be swallowed.
        return parse(r"\boxed{" + side + "}", latex_only, parsing_timeout=None)

    def is_equal(answer: str, gold: str) -> bool:
        return bool(
            verify(
                parsed(gold), parsed(answer), float_rounding=6, numeric_precision=15, strict=True, timeout_seconds=None
            )
        )

    return is_equal


def math_verify_task() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import and warm up math-verify. Return the task {"answer", "gold"} -> {"reason": "correct" or "wrong"}."""
    is_equal = _math_verify()
    for example in _WARM_UP:
        is_equal(example, example)
    return equality_task(is_equal)


def equality_task(is_equal: Callable[[str, str], bool]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the task that runs the comparison. An answer that raises does not match. MemoryError propagates."""

    def compare(request: dict[str, Any]) -> dict[str, Any]:
        try:
            matches = is_equal(request["answer"], request["gold"])
        except MemoryError:
            raise
        except Exception:  # math-verify and sympy raise many kinds of errors on hostile text
            matches = False
        return {"reason": "correct" if matches else "wrong"}

    return compare
