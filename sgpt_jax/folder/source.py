"""Finding a model: a folder, a .gguf file, or a name on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import glob
import json
import os
import re
import warnings
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sgpt_jax.checkpoint.gguf_reader import parts_of
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_json
from sgpt_jax.runtime.compile_cache import user_cache

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


# What a model folder needs, by name. Weights are added to these.
_WANTED = [
    "*.json",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "README.md",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "[0-9]_*/config.json",
    "[0-9][0-9]_*/config.json",
    # Dense layers behind the pooling
    "[0-9]_*/model.safetensors",
    "[0-9]_*/pytorch_model.bin",
]


_SAFETENSORS = r"model(-\d+-of-\d+)?\.safetensors"


_BIN = r"pytorch_model(-\d+-of-\d+)?\.bin"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on this machine: a folder or a `.gguf` file, and the name it goes by."""

    path: Path
    name: str


def resolve(source: str | os.PathLike[str]) -> Source:
    """Finds a model: an existing folder or `.gguf` file, else `name` or `org/name` on the Hugging Face hub.

    A folder whose only weights are one `.gguf` file (split or not) is that file. A hub id may end in `@revision`. What
    the hub has is kept in its cache, and taken from there when the hub cannot be reached. Of the weights, safetensors
    are fetched, and `.bin` files only where there are none.

    Raises InputError when the source is neither, naming both possibilities.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return Source(_weights_of(path), path.resolve().name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{text}: a model is a folder, a .gguf file or a hub id, not this kind of file")
        return Source(path, path.stem)
    missing = f"{text}: there is no such folder or .gguf file"
    if "://" in text:
        raise InputError(f"{missing}; copy models from other storage to a local folder first")
    if not _HUB_ID.fullmatch(text) or path.suffix.lower() == ".gguf":
        raise InputError(f"{missing}, and it is not the form of a hub id (org/name)")
    repo, _, revision = text.partition("@")
    return Source(_weights_of(Path(_download(repo, revision or None, missing))), repo)


def _weights_of(folder: Path) -> Path:
    """The folder, or its GGUF file where it has nothing else to load.

    Raises:
        InputError: there are several such files.
    """
    if (folder / "modules.json").exists() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return folder
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    if found and found == parts_of(found[0]):  # all parts of one file
        return found[0]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{folder}: several GGUF files; name one of them: {names}")
    return found[0] if found else folder


def _download(repo: str, revision: str | None, missing: str) -> str:
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
    except HFValidationError as error:
        raise InputError(f"{missing}, and it is not the form of a hub id (org/name): {error}") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo}: the hub has this model, but no revision {revision!r}") from error
    except GatedRepoError as error:
        raise _gated(repo, error) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{missing}, and the Hugging Face hub has no model of that name") from error
    except Exception as error:  # the hub's HTTP library, and so its errors, change with its version
        return _cached(repo, revision, missing, error)
    names = [sibling.rfilename for sibling in info.siblings or []]
    files = choose_files(names)
    _check_choice(repo, names, files)
    with contextlib.suppress(OSError, InputError):  # a cache that cannot be written
        record = _record(repo, info.sha or "")
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, files)
    try:
        return huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=[glob.escape(name) for name in files]
        )
    except GatedRepoError as error:
        raise _gated(repo, error) from error
    except Exception as error:
        raise InputError(
            f"{repo}: cannot be fetched: {_first_line(error)}; start again, what is there is kept"
        ) from error


def _gated(repo: str, error: GatedRepoError) -> InputError:
    return InputError(
        f"{repo}: the hub asks for a login and accepted terms (`hf auth login`): {_first_line(error)}"
    )


def _check_choice(repo: str, names: list[str], files: list[str]) -> None:
    """Refuses a repository of which nothing, or none of several GGUF files, is chosen.

    Raises:
        InputError: it is one.
    """
    found = [name for name in names if name.lower().endswith(".gguf")]
    if found and not any(name.endswith((".safetensors", ".bin")) or name in found for name in files):
        raise InputError(f"{repo}: download one of its GGUF files and give its path: {', '.join(found)}")
    if not files:
        raise InputError(f"{repo}: no model in this repository")


def _record(repo: str, commit: str) -> Path:
    """The file that lists what a model needs, written before it is fetched: what an interruption leaves looks whole."""
    return Path(user_cache()) / "hub" / f"{repo.replace('/', '--')}@{commit}.json"


def _cached(repo: str, revision: str | None, missing: str, reason: Exception) -> str:
    try:
        found = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{missing}, and the Hugging Face hub cannot be reached ({_first_line(reason)}) "
            "nor has its cache this model"
        ) from error
    _check_snapshot(repo, Path(found))
    return found


def _check_snapshot(repo: str, folder: Path) -> None:
    """Refuses a snapshot whose download was interrupted.

    Raises:
        InputError: files are missing.
    """
    try:
        missing = [
            name
            for name in json.loads(_record(repo, folder.name).read_text())
            if not (folder / name).exists()
        ]
    except (OSError, ValueError, TypeError):  # another program fetched it
        if not (folder / "modules.json").exists():
            warnings.warn(
                f"{repo}: the hub cannot be reached, and its cached copy has no modules.json. If the model has one, "
                "the download was not finished, and pooling, prompts and limit may be others than the model's",
                stacklevel=2,
            )
        return
    if missing:
        raise InputError(
            f"{repo}: its download was interrupted before {', '.join(missing[:5])}, and the hub cannot be reached; "
            "start again with a connection"
        )


def choose_files(names: list[str]) -> list[str]:
    """Of a repository's file names, those that a model needs: settings, tokenizer, and one kind of weights."""
    top = [name for name in names if "/" not in name]
    chosen = [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in _WANTED)
    ]
    for pattern in (_SAFETENSORS, _BIN):
        weights = [name for name in top if re.fullmatch(pattern, name)]
        if weights:
            return chosen + weights
    files = [name for name in top if name.lower().endswith(".gguf")]
    whole = bool(files) and sorted(files) == [part.name for part in parts_of(sorted(files)[0])]
    return chosen + files if whole else chosen


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
