"""One process's part of writing shards: checks the documents that are there, encodes and writes those that are not."""

import collections
import contextlib
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import atomic_write
from sgpt_jax.index import recall
from sgpt_jax.index.columns import array_bytes, calibrate, check_id, checked_vectors, pack_columns
from sgpt_jax.index.files import CALIBRATION, GROWING, MANIFEST, Manifest, Shard
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.prefetch import ahead

EncodeChunks = Callable[[Iterator[list[str]]], Iterator[np.ndarray]]


@runtime_checkable
class Documents(Protocol):
    """Documents by their row."""

    @property
    def total(self) -> int | None:
        """How many there are, or None where only the end tells."""

    def read(self, start: int, stop: int) -> Iterator[Document]:
        """Rows ``[start, stop)``, fewer where the end comes first. Where ``total`` is None, starts only ascend."""


class Stream:
    """Documents that pass by once."""

    total: int | None = None

    def __init__(self, documents: Iterable[Document]) -> None:
        self._documents, self._row = iter(documents), 0

    def read(self, start: int, stop: int) -> Iterator[Document]:
        """Rows ``[start, stop)``; those before are passed over."""
        yield from itertools.islice(self._documents, start - self._row, stop - self._row)
        self._row = stop


def add_to_digest(digest: Any, id: str, text: str) -> None:
    """Adds a document to the digest of its shard."""
    for value in (id, text):
        encoded = value.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)


@dataclass
class _Piece:
    """A chunk to encode and write, and the digest of its shard's rows before it."""

    shard: Shard
    digest: Any
    documents: list[Document]


class Writer:
    """One process's part of a build, or of letting an index grow.

    Args:
        path: of the index.
        manifest: what is being written, with the shards that are safe.
        base: shards of the finished index that grows; none in a first build.
        documents: what the rows hold, from row 0 on, or with ``adding`` from the first new row on.
        adding: whether the documents of ``base`` are not among them.
        on_progress: see `sgpt_jax.index.build.build_index`.

    Attributes:
        rows: documents that there are, as far as they were read.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        base: list[Shard],
        documents: Documents,
        adding: bool,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.path, self.manifest, self.base = path, manifest, base
        self._documents, self._adding = documents, adding
        self._on_progress = on_progress or (lambda rows: None)
        self._known = {shard.start: shard for shard in manifest.shards}
        self._safe = manifest.rows
        self._old = sum(shard.rows for shard in base)
        self.rows = self._old if adding else 0
        self._first: tuple[list[Document], np.ndarray] | None = None  # that `prepare` had to encode
        self._probes: dict[int, recall.Probe] = {}

    def prepare(self, encode_chunks: EncodeChunks) -> None:
        """What has to be there before shards can be written: the manifest, and what depends on the first chunk."""
        manifest = self.manifest
        manifest.remove_shard_files(self.path, last=True)
        if self.base:
            manifest.save(self.path, GROWING)
            return
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
        chunk = list(self._documents.read(0, manifest.chunk_size))
        if not chunk:
            raise InputError("the corpus holds no document")
        _check_ids(chunk, 0)
        (vectors,) = encode_chunks(iter([_texts(chunk)]))
        self._first = chunk, vectors
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
            self._write(next(new), self._first[1])
        pieces: collections.deque[_Piece] = collections.deque()

        def texts() -> Iterator[list[str]]:
            for piece in new:
                pieces.append(piece)
                yield _texts(piece.documents)

        with contextlib.closing(ahead(encode_chunks(texts()), 1)) as encoded:
            for vectors in encoded:
                processes.check()
                self._write(pieces.popleft(), vectors)

    def _shards(self) -> Iterator[tuple[Shard, int, bool]]:
        """The shards to pass over, the rows that each can have, and whether it is this process's.

        Where the number of documents is known, these are shares of shards that follow each other, so that no process
        reads the others' documents; else all pass over everything, and take turns.
        """
        old = [] if self._adding else [(shard, shard.rows, True) for shard in self.base]
        size, total = self.manifest.shard_size, self._documents.total
        starts = itertools.count(self._old, size)
        if total is None:
            new = ((self._known.get(start, Shard(start)), size, True) for start in starts)
            for number, (shard, most, _) in enumerate(itertools.chain(old, new)):
                yield shard, most, processes.mine(number)
            return
        self.rows += total
        if self.rows < self._end():
            raise self._changed(f"it ends after {self.rows} documents, but the index has {self._end()}")
        known = [self._known.get(start, Shard(start)) for start in range(self._old, self.rows, size)]
        whole = [shard for shard in known if shard.rows == min(size, self.rows - shard.start)]
        rest = [shard for shard in known if shard.rows < min(size, self.rows - shard.start)]
        for some in (
            old,
            [(shard, shard.rows, True) for shard in whole],
            [(shard, size, True) for shard in rest],
        ):
            yield from processes.share(some)

    def _pieces(self) -> Iterator[_Piece]:
        """Reads the documents: checks those that are there, and yields the chunks that are not."""
        size = self.manifest.chunk_size
        for shard, most, mine in self._shards():
            safe, fingerprint = shard.rows, shard.fingerprint  # the shard itself grows meanwhile
            digest = hashlib.sha256()
            for done in range(0, most, size):
                stop = min(done + size, most)
                chunk = self._read(shard.start + done, shard.start + stop)
                old = min(stop - done, max(0, safe - done))
                if len(chunk) < old or (not chunk and self.rows < self._end()):
                    raise self._changed(
                        f"it ends after {self.rows} documents, but the index has {self._safe}"
                    )
                if mine and old:
                    for document in chunk[:old]:
                        add_to_digest(digest, document.id, document.text)
                    if done + old == safe:
                        self._check_digest(shard, safe, fingerprint, digest)
                if mine and len(chunk) > old:
                    _check_ids(chunk, shard.start + done)
                    yield _Piece(shard, digest, chunk)
                if len(chunk) < stop - done:
                    if self.rows < self._end():
                        continue  # to the error above
                    if self._documents.total is None:
                        return
                    break

    def _read(self, start: int, stop: int) -> list[Document]:
        before = self._old if self._adding else 0
        if self._first is not None and start == 0:
            chunk = self._first[0]
        else:
            chunk = list(self._documents.read(start - before, stop - before))
        if self._documents.total is None:
            self.rows = start + len(chunk)
        return chunk

    def _check_digest(self, shard: Shard, safe: int, fingerprint: str, digest: Any) -> None:
        if not fingerprint:
            raise InputError(
                f"{self.path}: was compacted and holds no texts, so that a corpus cannot be compared with it; give "
                "what is new with --add"
            )
        if digest.hexdigest() != fingerprint:
            raise self._changed(
                f"its documents {shard.start} to {shard.start + safe - 1} differ in ids, texts or order"
            )

    def _changed(self, what: str) -> InputError:
        if self.base and self.manifest.rows > self._old:
            return InputError(
                f"{self.path}: the corpus is not the one with which the index was growing when it was interrupted: "
                f"{what}. Use the same corpus, or remove {self.path / GROWING} to give up what was not finished"
            )
        other = "Use the same corpus, or another folder"
        if self.base:
            other = "Give what is new or has changed with --add and what has gone with --remove, or use another folder"
        return InputError(
            f"{self.path}: the corpus is not the one that this index was begun with: {what}. {other}"
        )

    def _end(self) -> int:
        """The row behind the last one that is safe."""
        return max((shard.start + shard.rows for shard in self.manifest.shards), default=0)

    def _write(self, piece: _Piece, vectors: np.ndarray) -> None:
        manifest, shard, chunk = self.manifest, piece.shard, piece.documents
        vectors = checked_vectors(manifest, chunk, vectors)
        probe = None
        if manifest.dtype != "float32" and not self.base:
            probe = self._probe(shard)
            probe.add(shard.start + shard.rows, vectors)
        manifest.append(
            self.path, shard, pack_columns(self.path, manifest, shard, chunk, vectors), len(chunk)
        )
        for document in chunk:
            add_to_digest(piece.digest, document.id, document.text)
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
        """Puts the shards of all processes, which have read so many ``rows``, into the manifest."""
        manifest = self.manifest
        manifest.shards = self.base + manifest.load_shards(self.path, last=True)
        if set(rows) != {manifest.rows}:
            raise InputError(
                f"{self.path}: the processes read {sorted(set(rows))} documents and wrote {manifest.rows}: "
                "the corpus changed meanwhile, or they do not see the same folder"
            )
        manifest.check_consistency()
        if manifest.dtype != "float32" and not self.base:
            manifest.recall = recall.measure(self.path, manifest)
        self._on_progress(manifest.rows)


def _texts(chunk: list[Document]) -> list[str]:
    return [document.text for document in chunk]


def _check_ids(chunk: list[Document], start: int) -> None:
    for number, document in enumerate(chunk):
        check_id(document.id, start + number)
