"""The error that every command shows as one line."""


class InputError(ValueError):
    """The user's input cannot be used as it is; the message names the file and line, or the list index."""
