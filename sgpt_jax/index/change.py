"""Removing documents from an index, and compacting it. Either can be killed at any moment and called again."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.errors import InputError, check_list
from sgpt_jax.files.lines import PathLike
from sgpt_jax.index.build import begin_growing, finish_growing
from sgpt_jax.index.columns import pack_strings
from sgpt_jax.index.files import GROWING, Manifest, Shard, local_folder
from sgpt_jax.index.locks import only_writer, remove_strangers
from sgpt_jax.index.lookup import Lookup
from sgpt_jax.index.reader import Columns
from sgpt_jax.index.removed import Removed
from sgpt_jax.index.search import Index
from sgpt_jax.index.writing import add_to_digest
from sgpt_jax.runtime import processes


def remove_documents(folder: PathLike, ids: Iterable[str]) -> tuple[int, list[str]]:
    """Removes documents, so that they are not found any more; their space stays until `compact_index`.

    Args:
        folder: of the index.
        ids: of the documents.

    Returns:
        how many were removed, and the ids that are not in the index.

    Raises:
        InputError: no finished index of this version is there, it is growing, or no document would be left.
        TypeError: for anything but a series of str.
    """
    path = local_folder(folder)
    check_list("ids", ids)
    wanted = list(dict.fromkeys(ids))
    for id in wanted:
        if not isinstance(id, str):
            raise TypeError(f"an id must be a str, not {id!r}")
    with only_writer(path):
        counted = _finished(path)
        _check_not_growing(path, counted)
        rows = Lookup(Index(path, counted)).rows(wanted)
        found = rows[rows >= 0]
        if len(found):
            removed = Removed(np.union1d(Removed.load(path, counted).numbers, found))
            if len(removed) == counted.rows:
                raise InputError(f"{path}: no document would be left; remove the folder instead")
            counted = removed.save(path, counted)
            counted.save(path)
            remove_strangers(path, counted)
    return len(found), [id for id, row in zip(wanted, rows.tolist(), strict=True) if row < 0]


def compact_index(folder: PathLike, on_progress: Callable[[int], None] | None = None) -> Index:
    """Writes the documents that are left into full shards, without encoding anything, and removes what was before.

    Until its end the index is what it was, and whoever has it open keeps it: those files are removed by the next change
    of the index then. The result has the bytes that a build of the documents that are left would have had, in a folder
    of its own, with the recall and the calibration of the first build.

    Args:
        folder: of the index.
        on_progress: called with the number of documents that are written.

    Raises:
        InputError: no finished index of this version is there, or it is growing.
    """
    path = local_folder(folder)
    with only_writer(path):
        counted = _finished(path)
        index = Index(path, counted)
        full = all(shard.rows == counted.shard_size for shard in counted.shards[:-1])
        there = Manifest.load(path, GROWING, written=False) if (path / GROWING).exists() else None
        fresh = replace(counted, complete=False, generation=counted.generation + 1, removed=None, shards=[])
        if there != fresh:
            _check_not_growing(path, counted)
            if full and counted.removed is None:
                return Index.open(path)
            fresh.save(path, GROWING)
        fresh.shards = fresh.load_shards(path)
        remove_strangers(path, counted, fresh)
        fresh.shard_folder(path).mkdir(exist_ok=True)
        _copy(path, index, fresh, on_progress or (lambda rows: None))
        fresh = replace(fresh, complete=True)
        fresh.check_consistency()
        fresh.save(path)
        finish_growing(path, fresh)
    return Index.open(path)


def _finished(path: Path) -> Manifest:
    if processes.count() > 1:
        raise InputError("documents are removed, and an index is compacted, by one process")
    found = Manifest.load(path)
    if not found.complete:
        raise InputError(f"{path}: the index is unfinished; build it from the same corpus first")
    if not found.titled:
        raise InputError(
            f"{path}: holds an index of an earlier version, which can be searched, but not changed"
        )
    return found


def _check_not_growing(path: Path, counted: Manifest) -> None:
    begin_growing(path, counted, leader=True)  # which ends what was finished but for its leftovers
    if (path / GROWING).exists():
        raise InputError(
            f"{path}: was interrupted while it grew: go on with the same command as then, or remove {path / GROWING} "
            "to give up what was not finished"
        )


def _copy(path: Path, index: Index, fresh: Manifest, on_progress: Callable[[int], None]) -> None:
    """Writes the documents of an index into the shards of a new generation, from where they are."""
    known = {shard.start: shard for shard in fresh.shards}
    columns = Columns(path, index.manifest)
    fresh.shards = []
    for start in range(0, len(index), fresh.shard_size):
        shard = known.get(start, Shard(start))
        fresh.shards.append(shard)
        end, digest = min(start + fresh.shard_size, len(index)), hashlib.sha256()
        for first in range(start, end, fresh.chunk_size):
            rows = index.rows(first, min(first + fresh.chunk_size, end))
            new = first >= shard.start + shard.rows
            if not new and shard.start + shard.rows >= end:
                continue
            packed = _packed(index, columns, shard, rows, digest)
            if new:
                fresh.append(path, shard, packed, len(rows))
                shard.fingerprint = digest.hexdigest() if fresh.store_texts else ""
                fresh.save_shard(path, shard)
        on_progress(end)


def _packed(index: Index, columns: Columns, shard: Shard, rows: np.ndarray, digest: Any) -> dict[str, bytes]:
    """What is stored of some rows, as it is added to the columns of a new shard, whose digest they are added to."""
    manifest = index.manifest
    parts: dict[str, list[bytes]] = {}
    for old, _, local in columns.by_shard(rows):
        for column in ("vectors", "scales", "title-sizes"):
            if column in manifest.sizes(old):
                table = columns.read(old, column, local).reshape(old.rows, -1)
                parts.setdefault(column, []).append(table[local].tobytes())
    packed = {column: b"".join(some) for column, some in parts.items()}
    ids = index.ids(rows)
    packed |= pack_strings(ids, shard.id_bytes, "id")
    if manifest.store_texts:
        texts = index.texts(rows)
        packed |= pack_strings(texts, shard.text_bytes, "text")
        for id, text in zip(ids, texts, strict=True):
            add_to_digest(digest, id, text)
    return packed
