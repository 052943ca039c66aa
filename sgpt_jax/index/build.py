"""Building an index and letting it grow: resumable after a kill at any moment, by one process or several, always with
the same bytes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import PathLike
from sgpt_jax.index import recall
from sgpt_jax.index.files import DTYPES, GROWING, MANIFEST, Dtype, Manifest, Similarity, local_folder
from sgpt_jax.index.locks import only_writer, remove_strangers
from sgpt_jax.index.lookup import Lookup
from sgpt_jax.index.removed import Removed
from sgpt_jax.index.search import Index
from sgpt_jax.index.writing import Documents, EncodeChunks, Stream, Writer
from sgpt_jax.runtime import processes

# Few enough for many processes to have equal shares, many enough for the number of files.
SHARD_ROWS = 1 << 14

_OPTIONS = ("dtype", "similarity", "chunk_size", "shard_size", "store_texts")
_SOURCES = ("model", "biases")  # metadata that only say where a model lay


def build_index(
    folder: PathLike,
    documents: Iterable[Document] | Documents,
    encode_chunks: EncodeChunks,
    *,
    dtype: Dtype = "float32",
    similarity: Similarity = "cosine",
    chunk_size: int = 1024,
    store_texts: bool = True,
    metadata: dict[str, Any] | None = None,
    fingerprint: str = "",
    on_progress: Callable[[int], None] | None = None,
) -> Index:
    """Builds an index, goes on with one that was interrupted, or adds what a finished one lacks of a longer corpus.

    After every chunk the index is safe on disk. A later call with the same corpus, options and encoder reads the
    documents that are there already (to see that they are the same), encodes the others, and ends with the very
    bytes of an unbroken build. Memory holds a few chunks. A finished index can be searched while it grows, and whoever
    has it open keeps what it was then.

    In a `processes.session` all processes call this with the same arguments and a folder that all of them see. Where
    the number of documents is known each reads its share of them; of a stream all pass over everything. Each encodes
    and writes whole shards, and checks the documents of its own. The files are those of one process, and a broken build
    may go on with another number of them.

    Args:
        folder: where; made when it is not there.
        documents: the corpus with distinct ids, from its beginning, in a fixed order; a stream, or by row.
        encode_chunks: a stream of lists of texts -> a stream of their vectors [n, E], such as
            `BiEncoder.encode_chunks`, so that it can read ahead. Lists have ``chunk_size`` texts (the last one fewer).
            It runs in a thread of its own, so that the next chunk is encoded while one is being written.
        dtype: how vectors are stored. "int8" takes a quarter of float32, "float16" half; the recall that is left
            is measured during the first build (see `Index.info`).
        similarity: "cosine" (vectors are stored normalised) or "dot".
        chunk_size: documents between two moments of safety.
        store_texts: keep the texts, for showing what was found.
        metadata: JSON values that say how the vectors were made; they must be the same when a build goes on. With a
            fingerprint the keys "model" and "biases", which say where that model lay, may change.
        fingerprint: what tells the model and its settings from any other, 40 hexadecimal digits
            (`sgpt_jax.checkpoint.fingerprint.model_fingerprint`); empty where that is not known.
        on_progress: called with the number of documents that are safe, first with those found there; of several
            processes, those found and those of this process since.

    Raises:
        InputError: no document, a bad id, vectors that are not finite or of the wrong shape; the folder holds
            something else, or an index of another corpus, other options or another encoder; another process failed.
    """
    path = local_folder(folder)
    if chunk_size < 1 or dtype not in DTYPES or similarity not in ("cosine", "dot"):
        raise InputError(f"chunk_size {chunk_size}, dtype {dtype!r}, similarity {similarity!r}: not possible")
    shard_size = max(1, SHARD_ROWS // chunk_size) * chunk_size
    wanted = Manifest(dtype, similarity, chunk_size, shard_size, store_texts, metadata or {}, fingerprint)
    source = documents if isinstance(documents, Documents) else Stream(documents)
    with _growing(path, wanted) as (counted, growing, let_others_in):
        base = counted.shards if counted is not None else []
        writer = Writer(path, growing, base, source, False, on_progress)
        return _write(writer, counted, None, encode_chunks, let_others_in)


def add_documents(
    folder: PathLike,
    documents: Iterable[Document],
    encode_chunks: EncodeChunks,
    *,
    metadata: dict[str, Any] | None = None,
    fingerprint: str = "",
    on_progress: Callable[[int], None] | None = None,
) -> Index:
    """Adds documents to a finished index.

    One whose id is there with the same text is passed over, one whose id is there with another text takes the place of
    that (in an index without texts every one does). Interrupted and called again with the same documents, it goes on
    and ends with the bytes of an unbroken call; until its end the index is what it was.

    Args:
        folder: of the index.
        documents: with distinct ids, in a fixed order.
        encode_chunks: see `build_index`.
        metadata: of the encoder; must be the index's, see `build_index`.
        fingerprint: of the model; must be the index's.
        on_progress: see `build_index`.

    Raises:
        InputError: no finished index of this version is there; a document has no id but its number; see also
            `build_index`.
    """
    path = local_folder(folder)
    found = Manifest.load(path)
    if not found.complete:
        raise InputError(
            f"{path}: the index is unfinished; build it from the same corpus before adding to it"
        )
    wanted = replace(found, metadata=metadata or {}, fingerprint=fingerprint)
    with _growing(path, wanted) as (counted, growing, let_others_in):
        assert counted is not None
        replaced: list[int] = []
        lookup = Lookup(Index(path, counted))
        source = Stream(lookup.new(documents, growing.chunk_size, replaced))
        writer = Writer(path, growing, counted.shards, source, True, on_progress)
        return _write(writer, counted, replaced, encode_chunks, let_others_in)


@contextlib.contextmanager
def _growing(path: Path, wanted: Manifest) -> Iterator[tuple[Manifest | None, Manifest, Callable[[], None]]]:
    """Holds the folder for writing; yields the finished manifest there or None, what is to be written, with the shards
    that are safe, and what the first process calls to let the others in."""
    leader = processes.first()
    if not leader:
        processes.gather(None)  # until the first process has begun
    with only_writer(path, leader=leader, shared=processes.count() > 1) as let_others_in:
        if not (path / MANIFEST).exists():
            if any(path.iterdir()):
                raise InputError(f"{path}: is not empty, and not an index")
            yield None, wanted, let_others_in
            return
        found = Manifest.load(path)
        _check_same(path, found, wanted)
        if not found.complete:
            yield None, found, let_others_in
            return
        try:
            yield found, begin_growing(path, found, leader=leader), let_others_in
        finally:
            if leader and not any(found.shard_folder(path).glob("[0-9]*-[0-9]*.json")):
                (path / GROWING).unlink(missing_ok=True)  # nothing is lost by beginning anew


def begin_growing(path: Path, counted: Manifest, *, leader: bool) -> Manifest:
    """What an interrupted growth of an index has written so far, or a new one; the leader removes older leftovers.

    Raises:
        InputError: the index is being compacted.
    """
    there = Manifest.load(path, GROWING, written=False) if (path / GROWING).exists() else None
    if there is not None and there.generation == counted.generation + 1:
        raise InputError(f"{path}: is being compacted: finish that first (sgpt index -o {path} --compact)")
    if there is not None and there == replace(counted, complete=False):
        there.shards += there.load_shards(path)
        if leader:
            remove_strangers(path, counted, there)
        return there
    if leader:  # finished, but for removing what it left
        finish_growing(path, counted)
    return replace(counted, complete=False, shards=list(counted.shards))


def finish_growing(path: Path, counted: Manifest) -> None:
    """Removes what a growth needed, and what ``counted``, now the manifest, has taken the place of."""
    (path / GROWING).unlink(missing_ok=True)
    counted.remove_shard_files(path)
    remove_strangers(path, counted)


def _write(
    writer: Writer,
    counted: Manifest | None,
    replaced: list[int] | None,
    encode_chunks: EncodeChunks,
    let_others_in: Callable[[], None],
) -> Index:
    path, manifest, leader = writer.path, writer.manifest, processes.first()
    if leader:
        writer.prepare(encode_chunks)
        let_others_in()
        processes.gather(None)
    writer.run(encode_chunks)
    rows = processes.gather(writer.rows)  # until all are done
    if leader:
        writer.finish(rows)
        if counted is None or len(manifest.shards) > len(counted.shards):
            if counted is not None and replaced:
                before = Removed.load(path, counted).numbers
                removed = Removed(np.union1d(before, np.array(replaced, np.int64)))
                manifest = removed.save(path, manifest)
            manifest = replace(manifest, complete=True)
            manifest.save(path)
        finish_growing(path, manifest)
        recall.remove_probes(path)
    processes.gather(None)
    return Index.open(path)


def _check_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises InputError unless the index there has the options and the encoder that are wanted."""
    if not found.titled:
        raise InputError(
            f"{path}: holds an index of an earlier version, which can be searched, but not go on; use another folder"
        )
    there, now = found.plain(), wanted.plain()
    differences = [name for name in _OPTIONS if there[name] != now[name]]
    texts = [f"{name} is {there[name]!r} there and {now[name]!r} now" for name in differences]
    before, after = there["metadata"], now["metadata"]
    same_model = found.fingerprint and found.fingerprint == wanted.fingerprint
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not (same_model and name in _SOURCES):
            texts.append(f"{name} is {before.get(name)!r} there and {after.get(name)!r} now")
    if texts:
        raise InputError(
            f"{path}: holds an index that was begun otherwise: {'; '.join(texts)}. "
            "Use the same options, or another folder"
        )
    if found.fingerprint != wanted.fingerprint:
        raise InputError(
            f"{path}: holds vectors of another model: the weights or settings changed since it was begun (fingerprint "
            f"{found.fingerprint[:12] or 'none'} there, {wanted.fingerprint[:12] or 'none'} now). Index into another "
            "folder, or remove this one first"
        )
