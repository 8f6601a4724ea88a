"""The task of a worker that grades by the user's reward function: `reward.function=package.module:name`.

The function takes a completion and the dataset's row, and returns a reward, or a reward and a reason. It is imported
and called in grading workers only, never in the trainer. `docs/rewards.md` is the user's page.
"""

import importlib
import inspect
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_REASON_CHARS = 200


def user_function_task(function: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import the function. Return the task {"completion", "row"} -> {"reward", "reason"}.

    If a call fails, or does not return a finite number, its reply has no reward. ValueError, with the remedy, when the
    function cannot be used.
    """
    called = imported(function)

    def grade(request: dict[str, Any]) -> dict[str, Any]:
        try:
            return reply_to(called(request["completion"], request["row"]))
        except MemoryError:
            raise
        except Exception as error:
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            place = f"{Path(frame.f_code.co_filename).name}, line {line}"
            return {"reason": f"error: {type(error).__name__} ({place}): {error}"[:MAX_REASON_CHARS]}

    return grade


def imported(function: str) -> Callable[[str, dict[str, Any]], object]:
    """Import module:name from the folder that the command was started in, PYTHONPATH or the installed packages.

    ValueError, with the remedy, when it cannot be imported or called.
    """
    folder = os.getcwd()
    sys.path.insert(0, folder)
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"importing {module_name} finds no module {error.name!r} in {folder}, on PYTHONPATH or among the installed "
            f"packages: start the command in the folder that holds it, or install it"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"importing {module_name} failed with {error!r}: correct it, or raise verifier.memory_gb if it is large"
        ) from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in vars(module):
        raise ValueError(f"{module.__file__} has no {name!r}: give one of {', '.join(functions) or 'its functions'}")
    called = vars(module)[name]
    if not callable(called):
        raise ValueError(f"{name!r} in {module.__file__} is a {type(called).__name__}: give the name of a function")
    check_parameters(called, name)
    return called


def check_parameters(called: Callable[..., object], name: str) -> None:
    """Refuse a function that cannot be called with a completion and a row. Accept a builtin without a signature."""
    try:
        signature = inspect.signature(called)
    except ValueError:
        return
    try:
        signature.bind("completion", {})
    except TypeError as error:
        raise ValueError(f"{name}{signature} cannot be called: let it take (completion, row)") from error


def reply_to(returned: Any) -> dict[str, Any]:
    """Turn what the function returned into a reply. Booleans and other scalars that float() takes are numbers.

    >>> reply_to(0.3), reply_to((1.5, "3 of 3 tests")), reply_to(True)["reward"]
    ({'reward': 0.3, 'reason': ''}, {'reward': 1.5, 'reason': '3 of 3 tests'}, 1.0)
    >>> reply_to("0.3")
    {'reason': "error: returned '0.3', which is no finite number"}
    """
    reward, reason = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, "")
    try:
        number = math.nan if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return {"reason": f"error: returned {reprlib.repr(returned)}, which is no finite number"}
    if not isinstance(reason, str):
        return {"reason": f"error: returned {reprlib.repr(returned)}, whose reason is no text"}
    return {"reward": number, "reason": reason[:MAX_REASON_CHARS]}
