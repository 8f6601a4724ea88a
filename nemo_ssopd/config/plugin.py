"""Import of functions that the user names in a setting as package.module:name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from nemo_ssopd.config.checks import check_function_name


def load_function(setting: str, name: str) -> Callable[..., Any]:
    """Import the function that a setting names; ValueError, with the remedy, if it cannot be imported.

    The working directory is searched, too. The code runs in this process: name only code that you trust.
    """
    check_function_name(setting, name)
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{setting}={name!r} cannot be imported ({error}): put {module} into the working directory or on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"{setting}={name!r} is no function: name one that returns the loss")
    return function
