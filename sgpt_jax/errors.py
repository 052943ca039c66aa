"""The error that every command shows as one line, and what raises it for a wrong argument."""

import operator


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
