"""Building an index: resumable after a kill at any moment, with the same bytes as if nothing had happened."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.files import InputError, PathLike, atomic_write, fix_surrogates
from sgpt_jax.index import Index
from sgpt_jax.index_files import (
    CALIBRATION,
    DTYPES,
    MANIFEST,
    Dtype,
    Manifest,
    Similarity,
    calibrate,
    check_id,
    load_array,
    local_folder,
    normalized,
    only_writer,
    pack_strings,
    quantize,
    save_array,
)
from sgpt_jax.io import Document

SHARD_ROWS = 1 << 20
PROBE_QUERIES = 128
PROBE_DEPTH = 100

_OPTIONS = ("format", "dtype", "similarity", "chunk_size", "shard_size", "store_texts", "metadata")


def build_index(
    folder: PathLike,
    documents: Iterable[Document],
    encode: Callable[[list[str]], np.ndarray],
    *,
    dtype: Dtype = "float32",
    similarity: Similarity = "cosine",
    chunk_size: int = 1024,
    store_texts: bool = True,
    metadata: dict[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Index:
    """Builds an index, or goes on with one that was interrupted, or checks one that is finished.

    After every chunk the index is safe on disk. A later call with the same corpus, options and encoder reads the
    documents that are there already (to see that they are the same), encodes the others, and ends with the very
    bytes of an unbroken build. Memory holds one chunk.

    Args:
        folder: where; made when it is not there.
        documents: the corpus with distinct ids, from its beginning, in a fixed order.
        encode: texts -> vectors [n, E]; gets ``chunk_size`` texts (the last time fewer).
        dtype: how vectors are stored. "int8" takes a quarter of float32, "float16" half; the recall that is left
            is measured during the build (see `Index.info`).
        similarity: "cosine" (vectors are stored normalised) or "dot".
        chunk_size: documents between two moments of safety.
        store_texts: keep the texts, for showing what was found.
        metadata: JSON values that say how the vectors were made; they must be the same when a build goes on.
        on_progress: called with the number of documents that are safe, first with those found there.

    Raises:
        InputError: no document, a bad id, vectors that are not finite or of the wrong shape; the folder holds
            something else, or an index of another corpus, other options or another encoder.
    """
    path = local_folder(folder)
    if chunk_size < 1 or dtype not in DTYPES or similarity not in ("cosine", "dot"):
        raise InputError(f"chunk_size {chunk_size}, dtype {dtype!r}, similarity {similarity!r}: not possible")
    shard_size = max(1, SHARD_ROWS // chunk_size) * chunk_size
    manifest = Manifest(dtype, similarity, chunk_size, shard_size, store_texts, metadata or {})
    with only_writer(path):
        if (path / MANIFEST).exists():
            manifest = _resumed(path, manifest)
        elif any(path.iterdir()):
            raise InputError(f"{path}: is not empty, and not an index")
        digest = hashlib.sha256()
        stream = iter(documents)
        _skip(path, manifest, stream, digest)
        if on_progress is not None:
            on_progress(manifest.rows)
        if manifest.complete:
            if next(stream, None) is not None:
                raise _changed(path, f"it has more than the {manifest.rows} documents of the finished index")
            _remove_probes(path)
        else:
            _write(path, manifest, stream, digest, encode, on_progress)
        return Index(path, manifest)


def _resumed(path: Path, wanted: Manifest) -> Manifest:
    found = Manifest.load(path)
    there, now = found.plain(), wanted.plain()
    differences = [name for name in _OPTIONS if name != "metadata" and there[name] != now[name]]
    texts = [f"{name} is {there[name]!r} there and {now[name]!r} now" for name in differences]
    before, after = there["metadata"], now["metadata"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            texts.append(f"{name} is {before.get(name)!r} there and {after.get(name)!r} now")
    if texts:
        raise InputError(
            f"{path}: holds an index that was begun otherwise: {'; '.join(texts)}. "
            "Use the same options, or another folder"
        )
    return found


def _changed(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: the corpus is not the one that this index was begun with: {what}. "
        "Use the same corpus, or another folder"
    )


def _skip(path: Path, manifest: Manifest, stream: Iterator[Document], digest: Any) -> None:
    """Reads the documents that the index has, and makes sure that they are the same."""
    for number in range(manifest.rows):
        document = next(stream, None)
        if document is None:
            raise _changed(path, f"it ends after {number} documents, but the index has {manifest.rows}")
        _digest(digest, document)
    if manifest.rows and digest.hexdigest() != manifest.fingerprint:
        raise _changed(path, f"its first {manifest.rows} documents differ in ids, texts or order")


def _digest(digest: Any, document: Document) -> None:
    for value in (document.id, document.text):
        encoded = value.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)


def _write(
    path: Path,
    manifest: Manifest,
    stream: Iterator[Document],
    digest: Any,
    encode: Callable[[list[str]], np.ndarray],
    on_progress: Callable[[int], None] | None,
) -> None:
    probe = _Probe() if manifest.dtype != "float32" else None
    if probe is not None and manifest.rows:
        probe.load(_probe_path(path, manifest.rows))
    while chunk := list(itertools.islice(stream, manifest.chunk_size)):
        vectors = _vectors(manifest, chunk, encode)
        if not manifest.rows:
            manifest.save(path)  # from here on the folder is known as an index, and a kill can be recovered
        manifest.append(path, _columns(path, manifest, chunk, vectors), len(chunk))
        for document in chunk:
            _digest(digest, document)
        manifest.fingerprint = digest.hexdigest()
        if probe is not None:
            probe.add(vectors)
        if len(chunk) == manifest.chunk_size:
            if probe is not None:
                probe.save(_probe_path(path, manifest.rows))
            manifest.save(path)
            _remove_probes(path, but=manifest.rows)
            if on_progress is not None:
                on_progress(manifest.rows)
    if not manifest.rows:
        raise InputError("the corpus holds no document")
    if probe is not None:
        manifest.recall = probe.measure(Index(path, manifest))
    # A chunk that is not full is the last one, and it becomes safe together with the end of the build: otherwise
    # a corpus that has grown meanwhile could go on behind it with other chunks than an unbroken build.
    manifest.complete = True
    manifest.save(path)
    _remove_probes(path)
    if on_progress is not None:
        on_progress(manifest.rows)


def _vectors(
    manifest: Manifest, chunk: list[Document], encode: Callable[[list[str]], np.ndarray]
) -> np.ndarray:
    """Float32 vectors [n, E] of a chunk, normalised where the similarity says so."""
    vectors = np.asarray(encode([document.text for document in chunk]), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(chunk) or not vectors.shape[1]:
        raise InputError(f"the encoder gave an array of shape {vectors.shape} for {len(chunk)} texts")
    if manifest.dimension not in (0, vectors.shape[1]):
        raise InputError(
            f"the encoder gives {vectors.shape[1]} dimensions, but the index has {manifest.dimension}"
        )
    manifest.dimension = vectors.shape[1]
    with np.errstate(all="ignore"):
        if manifest.similarity == "cosine":
            vectors = normalized(vectors)
        smallest = np.float16 if manifest.dtype == "float16" else np.float32
        broken = ~np.isfinite(vectors.astype(smallest))
    if broken.any():
        document = chunk[int(broken.any(axis=1).argmax())]
        raise InputError(f"document {document.id!r}: its vector has NaN or infinity in {manifest.dtype}")
    return vectors


def _columns(path: Path, manifest: Manifest, chunk: list[Document], vectors: np.ndarray) -> dict[str, bytes]:
    """The bytes that a chunk adds to each column."""
    columns: dict[str, bytes] = {}
    if manifest.dtype == "int8":
        if not manifest.rows:
            save_array(path / CALIBRATION, calibrate(vectors))
        codes, factors = quantize(vectors, load_array(path / CALIBRATION))
        columns |= {"vectors": codes.tobytes(), "scales": factors.astype("<f4").tobytes()}
    else:
        columns["vectors"] = vectors.astype(DTYPES[manifest.dtype]).tobytes()
    fresh = not manifest.shards or manifest.shards[-1].rows == manifest.shard_size
    id_bytes, text_bytes = (0, 0) if fresh else (manifest.shards[-1].id_bytes, manifest.shards[-1].text_bytes)
    ids = [check_id(document.id, manifest.rows + number) for number, document in enumerate(chunk)]
    columns |= pack_strings(ids, id_bytes, "id")
    if manifest.store_texts:
        columns |= pack_strings([fix_surrogates(document.text) for document in chunk], text_bytes, "text")
    return columns


class _Probe:
    """Measures what the stored dtype costs: documents of the first chunk, spread over it, are the queries, and
    their float32 nearest neighbours are gathered from the whole corpus while it passes by."""

    def __init__(self) -> None:
        self.queries = np.zeros((0, 0), np.float32)
        self.rows = np.zeros(0, np.int64)  # the queries' own rows
        self.scores = np.zeros((0, 0), np.float32)  # [Q, <= PROBE_DEPTH], best first
        self.found = np.zeros((0, 0), np.int64)
        self.seen = 0

    def load(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as saved:
                for name in vars(self):
                    setattr(self, name, saved[name])
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        self.seen = int(self.seen)

    def save(self, path: Path) -> None:
        with atomic_write(path) as stream:
            np.savez(stream, **vars(self))

    def add(self, vectors: np.ndarray) -> None:
        if not self.seen:
            count = min(PROBE_QUERIES, len(vectors))
            self.rows = np.arange(count) * len(vectors) // count
            self.queries = vectors[self.rows]
            self.scores = np.zeros((count, 0), np.float32)
            self.found = np.zeros((count, 0), np.int64)
        rows = np.arange(self.seen, self.seen + len(vectors))
        scores = self.queries @ vectors.T
        scores[rows[None, :] == self.rows[:, None]] = -np.inf  # not itself
        scores = np.concatenate([self.scores, scores], axis=1)
        found = np.concatenate([self.found, np.broadcast_to(rows, (len(self.rows), len(rows)))], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :PROBE_DEPTH]
        self.scores = np.take_along_axis(scores, best, axis=1)
        self.found = np.take_along_axis(found, best, axis=1)
        self.seen += len(vectors)

    def measure(self, index: Index) -> dict[str, float] | None:
        """Shares of the float32 neighbours that the index finds among its own first 10 and 100."""
        others = self.seen - 1
        if not others:
            return None
        _, rows = index.search(self.queries, PROBE_DEPTH + 1)
        result: dict[str, float] = {"queries": len(self.queries)}
        for depth in (10, PROBE_DEPTH):
            size = min(depth, others)
            shares = []
            for own, exact, stored in zip(self.rows, self.found, rows, strict=True):
                shares.append(len(set(exact[:size]) & set(stored[stored != own][:size])) / size)
            result[f"recall@{depth}"] = round(float(np.mean(shares)), 4)
        return result


def _probe_path(path: Path, rows: int) -> Path:
    return path / f"recall-{rows:012d}.npz"


def _remove_probes(path: Path, but: int | None = None) -> None:
    for probe in path.glob("recall-*.npz"):
        if but is None or probe != _probe_path(path, but):
            probe.unlink()
