"""Model folders to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, Unpack

import huggingface_hub

from sgpt_jax.errors import InputError


class PushOptions(TypedDict, total=False):
    """How a folder is pushed, as of sentence-transformers' `push_to_hub`.

    Attributes:
        token: by default what `hf auth login` stored, or HF_TOKEN.
        private: make a private repository.
        exist_ok: add to a repository that is there, which is an error otherwise.
        commit_message: of the one commit.
        revision: a branch, made where it is not there.
        create_pr: open a pull request.
    """

    token: str | None
    private: bool | None
    exist_ok: bool
    commit_message: str
    revision: str | None
    create_pr: bool


def push_folder(write: Callable[[Path], object], repo_id: str, **options: Unpack[PushOptions]) -> str:
    """Uploads a folder as one commit.

    Args:
        write: writes the folder whose path it is given. Its last part is the name of the repository, which model cards
            show.
        repo_id: "org/name" or "name".
        options: see `PushOptions`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    revision, create_pr = options.get("revision"), options.get("create_pr", False)
    api = huggingface_hub.HfApi(token=options.get("token"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / repo_id.rpartition("/")[2]
        write(folder)
        try:
            url = api.create_repo(
                repo_id, private=options.get("private"), exist_ok=options.get("exist_ok", False) or create_pr
            )
            if revision is not None:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                commit_message=options.get("commit_message", "Add a model of sgpt-jax"),
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:  # the hub's HTTP library, and so its errors, change with its version
            raise InputError(f"{repo_id}: cannot be pushed to the hub: {error}") from error
    return commit.pr_url or commit.commit_url
