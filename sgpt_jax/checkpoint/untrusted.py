"""Files of a model folder that somebody else wrote: JSON of any content, paths of any form, pointers to files."""

from __future__ import annotations

import json
import os
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from etils import epath

from sgpt_jax.errors import InputError

_LFS = b"version https://git-lfs"


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: there is no such file, or it is not JSON; both name it.
    """
    file = epath.Path(path)
    try:
        content = file.read_bytes()
    except OSError as problem:
        missing = isinstance(problem, FileNotFoundError | NotADirectoryError)
        reason = (
            f"no {file.name}" if missing else f"{file.name} cannot be read: {problem.strerror or problem}"
        )
        raise InputError(f"{file.parent}: {reason}") from None
    refuse_pointer(file, content[: len(_LFS)])
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{file}: not valid JSON: {problem}") from None


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: see `read_json`; or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def inside(folder: epath.Path, name: Any, file: str) -> epath.Path:
    """A path below a model folder.

    Args:
        folder: the folder.
        name: the path as a file of the folder gives it.
        file: the name of that file, for the message.

    Raises:
        InputError: it is no text, absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or "\0" in name:
        raise InputError(f"{folder / file}: {name!r} is not the name of a file")
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts:
        raise InputError(f"{folder / file}: {name!r} leads out of the folder")
    return folder / name


def refuse_pointer(file: os.PathLike[str], start: bytes) -> None:
    """Refuses a file whose first bytes are those of a git-lfs pointer.

    Raises:
        InputError: they are.
    """
    if start == _LFS:
        raise InputError(f"{file}: a git-lfs pointer, not the file itself: run `git lfs pull` in the folder")


def check_content(file: str | os.PathLike[str]) -> None:
    """Refuses a git-lfs pointer in place of a large file.

    Raises:
        InputError: it is one.
    """
    path = epath.Path(file)
    if path.exists():
        with path.open("rb") as stream:
            refuse_pointer(path, stream.read(len(_LFS)))
