"""What a result needs besides its numbers to be repeated: command, versions, device, and the model's identity."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath

from .results import files_under

_PACKAGES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")
_MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".txt", ".model")


def provenance(*packages: str) -> dict[str, Any]:
    """Command, time, versions and device of this process, ready for JSON.

    Args:
        packages: further packages whose version matters.
    """
    return {
        "command": command(sys.argv[1:]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(*packages),
        "device": device(),
    }


def command(arguments: list[str]) -> str:
    """The command line of this process, to be typed in the project's folder.

    What lies in ``$SGPT_DATA`` is written with that name, so that the line also works elsewhere.
    """
    data = os.environ.get("SGPT_DATA")
    parts = []
    for argument in arguments:
        if data and (argument == data or argument.startswith(data.rstrip("/") + "/")):
            parts.append("$SGPT_DATA" + shlex.quote(argument[len(data.rstrip("/")) :] or "/").strip("'"))
        else:
            parts.append(shlex.quote(argument))
    return " ".join(["python", "-m", str(__package__), *parts])


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, this project (with its git commit) and the packages that numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("sgpt-jax", *_PACKAGES, *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["commit"] = _commit(Path(__file__).parent)
    return found


def _commit(folder: Path) -> str | None:
    """The commit that is checked out, with "-dirty" behind it if tracked files differ from it; None without git.

    Those in `folder`/results do not count: what a program writes there does not change what the next one does.
    """
    git = ["git", "-C", str(folder)]
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results"]
    try:
        found = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in ([*git, "rev-parse", "--short=12", "HEAD"], changed)
        ]
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None
    return found[0] + ("-dirty" if found[1] else "")


def device() -> dict[str, Any]:
    """What the numbers were computed on."""
    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }


def revision(path: epath.Path) -> str:
    """What tells this model from any other: the hub's commit, or a digest of the files (a file's own sha256).

    Args:
        path: a model folder or a .gguf file; a folder in the hub's cache is told by its commit.
    """
    commit = re.fullmatch("[0-9a-f]{40}", path.resolve().name)
    if commit and path.resolve().parent.name == "snapshots":
        return commit.group()
    if path.is_file():
        digest = _sha256(path)
    else:
        digest = hashlib.sha256()
        for file in files_under(path):
            if file.suffix in _MODEL_FILES:
                digest.update(file.relative_to(path).as_posix().encode() + b"\0" + _sha256(file).digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _sha256(file: epath.Path) -> Any:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest
