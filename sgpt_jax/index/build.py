"""Building an index: resumable after a kill at any moment, by one process or several, always with the same bytes."""

import collections
import contextlib
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import PathLike, atomic_write
from sgpt_jax.index import recall
from sgpt_jax.index.columns import array_bytes, calibrate, check_id, checked_vectors, pack_columns
from sgpt_jax.index.files import (
    CALIBRATION,
    DTYPES,
    MANIFEST,
    Dtype,
    Manifest,
    Shard,
    Similarity,
    local_folder,
    only_writer,
)
from sgpt_jax.index.search import Index
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.prefetch import ahead

EncodeChunks = Callable[[Iterator[list[str]]], Iterator[np.ndarray]]

# Few enough for many processes to have equal shares, many enough for the number of files.
SHARD_ROWS = 1 << 14

_OPTIONS = ("dtype", "similarity", "chunk_size", "shard_size", "store_texts")
_SOURCES = ("model", "biases")  # metadata that only say where a model lay


def build_index(
    folder: PathLike,
    documents: Iterable[Document],
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
    """Builds an index, or goes on with one that was interrupted, or checks one that is finished.

    After every chunk the index is safe on disk. A later call with the same corpus, options and encoder reads the
    documents that are there already (to see that they are the same), encodes the others, and ends with the very
    bytes of an unbroken build. Memory holds a few chunks.

    In a `processes.session` all processes call this with the same arguments and a folder that all of them see. Each
    passes over the whole corpus, and encodes and writes whole shards in turn; each checks the documents of its own. The
    files are those of one process, and a broken build may go on with another number of them.

    Args:
        folder: where; made when it is not there.
        documents: the corpus with distinct ids, from its beginning, in a fixed order.
        encode_chunks: a stream of lists of texts -> a stream of their vectors [n, E], such as
            `BiEncoder.encode_chunks`, so that it can read ahead. Lists have ``chunk_size`` texts (the last one fewer).
            It runs in a thread of its own, so that the next chunk is encoded while one is being written.
        dtype: how vectors are stored. "int8" takes a quarter of float32, "float16" half; the recall that is left
            is measured during the build (see `Index.info`).
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
    manifest = Manifest(dtype, similarity, chunk_size, shard_size, store_texts, metadata or {}, fingerprint)
    leader = processes.first()
    if not leader:
        processes.gather(None)  # until the first process has begun
    with only_writer(path, leader=leader, shared=processes.count() > 1) as let_others_in:
        if (path / MANIFEST).exists():
            manifest = _resumed(path, manifest)
        elif any(path.iterdir()):
            raise InputError(f"{path}: is not empty, and not an index")
        build = _Build(path, manifest, iter(documents), on_progress)
        if leader:
            build.prepare(encode_chunks)
            let_others_in()
            processes.gather(None)
        build.run(encode_chunks)
        rows = processes.gather(build.rows)  # until all are done
        if leader:
            build.finish(rows)
        processes.gather(None)
        return Index.open(path)


def _resumed(path: Path, wanted: Manifest) -> Manifest:
    found = Manifest.load(path)
    if not found.checked:
        raise InputError(f"{path}: holds an index of an earlier version; use another folder")
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
    return found


def _changed(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: the corpus is not the one that this index was begun with: {what}. "
        "Use the same corpus, or another folder"
    )


def _digest(digest: Any, document: Document) -> None:
    for value in (document.id, document.text):
        encoded = value.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)


@dataclass
class _Piece:
    """A chunk to encode and write, and the digest of its shard's rows before it."""

    shard: Shard
    digest: Any
    documents: list[Document]


class _Build:
    """One process's part of a build.

    Attributes:
        rows: documents in the corpus, as far as it was read.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        stream: Iterator[Document],
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.path, self.manifest, self.stream = path, manifest, stream
        self.rows = 0
        self._on_progress = on_progress or (lambda rows: None)
        self._known = {shard.start: shard for shard in manifest.shards}
        self._safe = manifest.rows
        self._first: np.ndarray | None = None  # vectors of the first chunk, if `prepare` had to encode it
        self._unread: list[list[Document]] = []
        self._probes: dict[int, recall.Probe] = {}

    def prepare(self, encode_chunks: EncodeChunks) -> None:
        """What has to be there before shards can be written: the manifest, and what depends on the first chunk."""
        manifest = self.manifest
        if manifest.complete:
            manifest.remove_shard_files(self.path)
            recall.remove_probes(self.path)
            return
        manifest.remove_shard_files(self.path, last=True)
        needed = [MANIFEST]
        needed += [CALIBRATION] if manifest.dtype == "int8" else []
        needed += [recall.QUERIES] if manifest.dtype != "float32" else []
        missing = [name for name in needed if not (self.path / name).exists()]
        if not missing:
            return
        if manifest.rows:  # which depend on what these files held
            raise InputError(
                f"{self.path / missing[0]}: is not there any more. Remove {self.path} and build again"
            )
        chunk = list(itertools.islice(self.stream, manifest.chunk_size))
        if not chunk:
            raise InputError("the corpus holds no document")
        _check_ids(chunk, 0)
        (vectors,) = encode_chunks(iter([_texts(chunk)]))
        self._first = vectors
        self._unread.append(chunk)
        vectors = checked_vectors(manifest, chunk, vectors)
        calibration = array_bytes(calibrate(vectors)) if manifest.dtype == "int8" else None
        manifest.calibration = None if calibration is None else zlib.crc32(calibration)
        manifest.save(self.path)  # from here on the folder is known as an index, and a kill can be recovered
        if calibration is not None:
            with atomic_write(self.path / CALIBRATION) as stream:
                stream.write(calibration)
        if manifest.dtype != "float32":
            recall.save_queries(self.path, vectors)

    def run(self, encode_chunks: EncodeChunks) -> None:
        """Writes this process's shards, from where they are."""
        self._on_progress(self._safe)
        new = self._pieces()
        if self._first is not None:
            self._write(next(new), self._first)
        pieces: collections.deque[_Piece] = collections.deque()

        def texts() -> Iterator[list[str]]:
            for piece in new:
                pieces.append(piece)
                yield _texts(piece.documents)

        with contextlib.closing(ahead(encode_chunks(texts()), 1)) as encoded:
            for vectors in encoded:
                processes.check()
                self._write(pieces.popleft(), vectors)

    def _pieces(self) -> Iterator[_Piece]:
        """Reads the corpus: checks the documents that are there, and yields the chunks that are not."""
        manifest, size = self.manifest, self.manifest.chunk_size
        for number in itertools.count():
            start = number * manifest.shard_size
            shard = self._known.get(start, Shard(start))
            safe, fingerprint = shard.rows, shard.fingerprint  # the shard itself grows meanwhile
            mine, digest = processes.mine(number), hashlib.sha256()
            for done in range(0, manifest.shard_size, size):
                chunk = self._next_chunk()
                self.rows += len(chunk)
                old = min(size, max(0, safe - done))
                if len(chunk) < old or (not chunk and self.rows < self._end()):
                    raise _changed(
                        self.path,
                        f"it ends after {self.rows} documents, but the index has {self._safe}",
                    )
                if mine and old:
                    for document in chunk[:old]:
                        _digest(digest, document)
                    if done + old == safe and digest.hexdigest() != fingerprint:
                        raise _changed(
                            self.path,
                            f"its documents {start} to {start + safe - 1} differ in ids, texts or order",
                        )
                if manifest.complete and len(chunk) > old:
                    raise _changed(
                        self.path, f"it has more than the {manifest.rows} documents of the finished index"
                    )
                if mine and len(chunk) > old:
                    _check_ids(chunk, start + done)
                    yield _Piece(shard, digest, chunk)
                if len(chunk) < size:
                    if self.rows < self._end():
                        continue  # to the error above
                    return

    def _next_chunk(self) -> list[Document]:
        if self._unread:
            return self._unread.pop()
        return list(itertools.islice(self.stream, self.manifest.chunk_size))

    def _end(self) -> int:
        """The row behind the last one that is safe."""
        return max((shard.start + shard.rows for shard in self.manifest.shards), default=0)

    def _write(self, piece: _Piece, vectors: np.ndarray) -> None:
        manifest, shard, chunk = self.manifest, piece.shard, piece.documents
        vectors = checked_vectors(manifest, chunk, vectors)
        probe = self._probe(shard) if manifest.dtype != "float32" else None
        if probe is not None:
            probe.add(shard.start + shard.rows, vectors)
        manifest.append(
            self.path, shard, pack_columns(self.path, manifest, shard, chunk, vectors), len(chunk)
        )
        for document in chunk:
            _digest(piece.digest, document)
        shard.fingerprint = piece.digest.hexdigest()
        if probe is not None:
            probe.save()
        # A chunk that is not full is the last one, and it becomes safe together with the end of the build: otherwise
        # a corpus that has grown meanwhile could go on behind it with other chunks than an unbroken build.
        full = len(chunk) == manifest.chunk_size
        manifest.save_shard(self.path, shard, last=not full)
        if probe is not None and full:
            probe.forget_older()
        self._safe += len(chunk)
        if full:
            self._on_progress(self._safe)

    def _probe(self, shard: Shard) -> recall.Probe:
        if shard.start not in self._probes:
            self._probes = {shard.start: recall.Probe(self.path, self.manifest, shard)}  # one shard at a time
        return self._probes[shard.start]

    def finish(self, rows: list[int]) -> None:
        """Merges the shards of all processes into the manifest."""
        manifest = self.manifest
        if not manifest.complete:
            manifest.shards = manifest.load_shards(self.path, last=True)
            if set(rows) != {manifest.rows}:
                raise InputError(
                    f"{self.path}: the processes read {sorted(set(rows))} documents and wrote {manifest.rows}: "
                    "the corpus changed meanwhile, or they do not see the same folder"
                )
            manifest.check_consistency()
            if manifest.dtype != "float32":
                manifest.recall = recall.measure(self.path, manifest)
            manifest.complete = True
            manifest.save(self.path)
            manifest.remove_shard_files(self.path)
            recall.remove_probes(self.path)
        self._on_progress(manifest.rows)


def _texts(chunk: list[Document]) -> list[str]:
    return [document.text for document in chunk]


def _check_ids(chunk: list[Document], start: int) -> None:
    for number, document in enumerate(chunk):
        check_id(document.id, start + number)
