"""The error that every command shows as one line, and what raises it for a wrong argument."""

import operator
from collections.abc import Mapping


class InputError(ValueError):
    """The user's input cannot be used as it is; the message names the file and line, or the list index."""


def whole(name: str, value: object) -> int:
    """An argument that is a whole number.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    return operator.index(value)  # type: ignore[arg-type]


def check_list(what: str, values: object) -> None:
    """Refuses what has letters, keys or names of columns where a list is meant: they would be taken for its elements.

    Args:
        what: should be in the list, for the message.
        values: an argument.

    Raises:
        TypeError: it is a str, a mapping or a DataFrame; the message says what to pass.
    """
    if isinstance(values, str):
        raise TypeError(f"expected a list of {what}, not one str")
    if isinstance(values, Mapping):
        raise TypeError(
            f"expected a list of {what}, not a {type(values).__name__}: pass list(x.values()) or list(x)"
        )
    if hasattr(values, "columns") and hasattr(values, "keys"):
        raise TypeError(f"expected a list of {what}, not a {type(values).__name__}: pass one of its columns")
