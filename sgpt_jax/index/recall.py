"""What a stored dtype costs, measured while an index is built: documents of the first chunk, spread over it, are the
queries, and their float32 nearest neighbours are gathered from the whole corpus while it passes by."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import atomic_write
from sgpt_jax.index.files import Manifest, Shard
from sgpt_jax.index.search import Index

PROBE_QUERIES = 128
PROBE_DEPTH = 100
QUERIES = "recall.npz"

Arrays = dict[str, np.ndarray]


def save_queries(folder: Path, vectors: np.ndarray) -> None:
    """Keeps the queries: rows of the first chunk's vectors, float32 [n, E]."""
    count = min(PROBE_QUERIES, len(vectors))
    rows = np.arange(count) * len(vectors) // count
    _save(folder / QUERIES, {"rows": rows, "queries": vectors[rows]})


class Probe:
    """The nearest neighbours of the queries among the rows of one shard.

    Args:
        folder: of the index.
        manifest: of the index.
        shard: the shard, with the rows that are safe: those found for them are read.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard: Shard) -> None:
        self._stem = manifest.path(folder, shard, "x").name.split(".")[0]
        self._folder, self._shard = folder, shard
        queries = _load(folder / QUERIES)
        self._rows, self._queries = queries["rows"], queries["queries"]
        if shard.rows:
            found = _load(self._path())
            self.scores, self.found = found["scores"], found["found"]
        else:
            self.scores = np.zeros((len(self._rows), 0), np.float32)  # [Q, <= PROBE_DEPTH], best first
            self.found = np.zeros((len(self._rows), 0), np.int64)

    def add(self, start: int, vectors: np.ndarray) -> None:
        """Looks at rows from ``start`` on, float32 [n, E]."""
        rows = np.arange(start, start + len(vectors))
        scores = self._queries @ vectors.T
        scores[rows[None, :] == self._rows[:, None]] = -np.inf  # not itself
        found = np.broadcast_to(rows, (len(self._rows), len(rows)))
        self.scores, self.found = _best([self.scores, scores], [self.found, found])

    def save(self) -> None:
        """Keeps what was found for the shard's rows as they are now, beside what was kept before."""
        _save(self._path(), {"scores": self.scores, "found": self.found})

    def forget_older(self) -> None:
        """Removes what was kept for fewer rows."""
        for path in self._folder.glob(f"{self._stem}.*.npz"):
            if path != self._path():
                path.unlink()

    def _path(self) -> Path:
        return self._folder / f"{self._stem}.{self._shard.rows}.npz"


def measure(folder: Path, manifest: Manifest) -> dict[str, float] | None:
    """Shares of the float32 neighbours that the index finds among its own first 10 and 100; None for one document."""
    others = manifest.rows - 1
    if not others:
        return None
    probes = [Probe(folder, manifest, shard) for shard in manifest.shards]
    _, neighbours = _best([probe.scores for probe in probes], [probe.found for probe in probes])
    queries = _load(folder / QUERIES)
    _, rows = Index(folder, manifest).search(queries["queries"], PROBE_DEPTH + 1)
    result: dict[str, float] = {"queries": len(rows)}
    for depth in (10, PROBE_DEPTH):
        size = min(depth, others)
        shares = []
        for own, exact, stored in zip(queries["rows"], neighbours, rows, strict=True):
            shares.append(len(set(exact[:size]) & set(stored[stored != own][:size])) / size)
        result[f"recall@{depth}"] = round(float(np.mean(shares)), 4)
    return result


def remove_probes(folder: Path) -> None:
    """Removes all that this module wrote."""
    for path in (folder / QUERIES, *folder.glob("[0-9]*-[0-9]*.npz")):
        path.unlink(missing_ok=True)


def _best(scores: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The PROBE_DEPTH best of all columns; of equal scores the earlier."""
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :PROBE_DEPTH]
    return np.take_along_axis(all_scores, best, axis=1), np.take_along_axis(all_rows, best, axis=1)


def _save(path: Path, arrays: Arrays) -> None:
    with atomic_write(path) as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _load(path: Path) -> Arrays:
    try:
        # Opened here: NumPy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            return dict(saved)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        # A broken build had kept it; without it the build begins anew.
        raise InputError(f"{path}: cannot be read: {error}. Remove {path.parent} and build again") from error
