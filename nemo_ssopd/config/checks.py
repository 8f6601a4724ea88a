"""Ranges of fields, declared where the fields are defined, and the check that enforces them."""

from __future__ import annotations

import dataclasses
from typing import Any


def checked(default: Any, **bounds: float) -> Any:
    """Declare a field with bounds: at_least, above, at_most, below. A value of None is not checked.

    >>> group_size: int = checked(8, at_least=1)
    """
    assert bounds.keys() <= _HOLDS.keys(), bounds
    return dataclasses.field(default=default, metadata=bounds)


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check the fields of a section and its subsections against their bounds.

    ValueError names field, value and remedy.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{prefix}{field.name}.")
        for relation, bound in field.metadata.items():
            require(
                value is None or _HOLDS[relation](value, bound),
                f"{prefix}{field.name}={value}: give a value {relation.replace('_', ' ')} {bound:g}",
            )


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_function_name(setting: str, name: str) -> None:
    """Check that a name has the form package.module:name. Nothing is imported."""
    module, colon, function = name.partition(":")
    parts = (*module.split("."), function)
    is_written_so = bool(colon) and not module.endswith(".py") and all(part.isidentifier() for part in parts)
    require(is_written_so, f"{setting}={name!r}: write it as package.module:name")


_HOLDS = {
    "at_least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at_most": lambda value, bound: value <= bound,
    "below": lambda value, bound: value < bound,
}
