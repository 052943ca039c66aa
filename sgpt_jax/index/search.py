"""Reading and searching an index on disk: memory-mapped, exact, in memory that does not grow with the corpus."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sgpt_jax.errors import InputError, whole
from sgpt_jax.files.lines import PathLike
from sgpt_jax.index.columns import load_calibration, normalized
from sgpt_jax.index.files import Manifest, local_folder
from sgpt_jax.index.held import HeldDtype
from sgpt_jax.index.hits import Hit, title_and_snippet
from sgpt_jax.index.locks import hold_for_reading
from sgpt_jax.index.reader import Columns
from sgpt_jax.index.removed import Removed
from sgpt_jax.index.resident import Resident, Source
from sgpt_jax.index.topk import Block, exact_top_k
from sgpt_jax.runtime import processes

# Elements of a block of vectors. Float32 blocks are views of the file; the others are converted on the device, and on a
# CPU a converted copy that is larger than the caches costs several times the search (100,000 x 768, one query: 460
# instead of 50 ms).
BLOCK_ELEMENTS = {"float32": 1 << 24, "float16": 1 << 22, "int8": 1 << 22}

_ATTEMPTS = 10  # at opening an index that is being replaced

logger = logging.getLogger(__name__)


class Index:
    """A finished index, as it was when it was opened. Rows count from 0 in corpus order, removed documents too."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Looks at the columns that ``manifest`` describes; `Index.open` is the way in for a finished index."""
        self.folder = folder
        self.manifest = manifest
        self._columns = Columns(folder, manifest)
        self._calibration = load_calibration(folder, manifest) if manifest.dtype == "int8" else None
        self._removed = Removed.load(folder, manifest)
        self._resident: Resident | None = None

    @classmethod
    def open(
        cls, folder: PathLike, *, mesh: Mesh | None = None, resident: HeldDtype | None = None
    ) -> "Index":
        """Opens an index.

        Args:
            folder: of the index.
            mesh: the devices that hold the vectors, sharded over all of them; None for the first one. Without
                ``resident`` it is not used. In a `processes.session` each process gives its own devices and opens the
                index at the same time: each holds its share of the rows.
            resident: hold the vectors on the devices as "float32", "bfloat16" or "int8", where they fit; None streams
                them from disk at every search. The results are the same: what is held with fewer bits than are stored
                proposes candidates, and the stored vectors say which are the best.

        Raises:
            InputError: no index there, one that is unfinished, or files that are missing, cut short or damaged. Columns
                are checked when they are read: by the methods that do so.
        """
        path = local_folder(folder)
        for attempt in range(_ATTEMPTS):
            manifest = Manifest.load(path)
            if not manifest.complete:
                raise InputError(
                    f"{path}: the index is unfinished ({manifest.rows} documents so far); "
                    "build it again from the same corpus to go on where it stopped"
                )
            try:
                index = cls(path, manifest)
                hold_for_reading(path, manifest, index)
            except (InputError, OSError) as error:
                # Somebody may be replacing it just now: then there is another manifest.
                if attempt + 1 < _ATTEMPTS and Manifest.load(path) != manifest:
                    continue
                if isinstance(error, OSError):
                    reason = error.strerror or str(error)
                    raise InputError(f"{error.filename}: cannot be read: {reason}") from error
                raise
            if Manifest.load(path).generation == manifest.generation:
                break
        if not manifest.checked:
            logger.warning(
                "%s: was made by an earlier version, without checksums and without the fingerprint of its model: "
                "damage and another model go unnoticed. Index again to have both",
                path,
            )
        if resident is not None:
            index._resident = Resident.load(index._source(), mesh, resident, str(path))
        return index

    def check_model(self, fingerprint: str) -> None:
        """Checks that queries and documents are encoded by one model with the same settings.

        Args:
            fingerprint: of the model for the queries, see `sgpt_jax.checkpoint.fingerprint.model_fingerprint`.

        Raises:
            InputError: the index knows its model, and that is another one.
        """
        own = self.manifest.fingerprint
        if own and own != fingerprint:
            raise InputError(
                f"{self.folder}: was made with another model: other weights or other settings (fingerprint {own[:12]} "
                f"there, {fingerprint[:12]} now). Vectors of two models cannot be compared: search with the model "
                "that made it, or index the corpus again into another folder"
            )

    def verify(self) -> None:
        """Reads the whole index and checks all of it.

        Raises:
            InputError: damaged files, all of them named; or there are no checksums.
        """
        if not self.manifest.checked:
            raise InputError(f"{self.folder}: was made by an earlier version, without checksums")
        damages = []
        for shard in self.manifest.shards:
            for column in self.manifest.sizes(shard):
                try:
                    if column != "checks":  # which the others are checked against
                        self._columns.read(shard, column)
                except InputError as error:
                    damages.append(str(error))
        if damages:
            raise InputError("; ".join(dict.fromkeys(damages)))

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"Index({self.folder}: {len(self):,} documents, dimension {self.dimension}, {manifest.dtype}, "
            f"{manifest.similarity}, model {manifest.metadata.get('model', 'unknown')})"
        )

    def __len__(self) -> int:
        """How many documents can be found."""
        return self.manifest.rows - len(self._removed)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows, int64, of the documents ``[start, stop)`` that can be found: all but removed ones."""
        return self._removed.number_of(np.arange(start, len(self) if stop is None else min(stop, len(self))))

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.manifest.dimension

    @property
    def metadata(self) -> dict[str, Any]:
        """What the builder of the index noted (the model, for one)."""
        return self.manifest.metadata

    def info(self) -> dict[str, Any]:
        """Facts for people: documents, removed ones that still take space, shards, dimension, dtype, similarity,
        bytes, the recall of the stored dtype, metadata, and the fingerprint of the model ("" where it is unknown).

        ``recall`` is {"queries", "recall@10", "recall@100"} against exact float32 search over the corpus of the first
        build, with documents of the corpus as queries; None for float32 itself.
        """
        manifest = self.manifest
        sizes: dict[str, int] = {}
        for shard in manifest.shards:
            for column, size in manifest.sizes(shard).items():
                sizes[column] = sizes.get(column, 0) + size
        return {
            "documents": len(self),
            "removed": len(self._removed),
            "shards": len(manifest.shards),
            "dimension": self.dimension,
            "dtype": manifest.dtype,
            "similarity": manifest.similarity,
            "texts": manifest.store_texts,
            "bytes": sum(sizes.values()),
            "vector_bytes": sizes.get("vectors", 0) + sizes.get("scales", 0),
            "recall": manifest.recall,
            "metadata": manifest.metadata,
            "fingerprint": manifest.fingerprint,
        }

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The document ids of some rows."""
        return self._columns.strings("id", rows)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The document texts of some rows.

        Raises:
            InputError: the index was built without texts.
        """
        if not self.manifest.store_texts:
            raise InputError(f"{self.folder}: this index holds no texts")
        return self._columns.strings("text", rows)

    def hits(self, scores: np.ndarray, rows: Sequence[int] | np.ndarray) -> list[Hit]:
        """Documents as they are shown.

        Args:
            scores: [n], such as `search` gives for one query.
            rows: [n].
        """
        ids, texts, titles = self.ids(rows), [""] * len(rows), [""] * len(rows)
        if self.manifest.store_texts:
            texts = self.texts(rows)
            for shard, members, local in self._columns.by_shard(rows):
                if not self.manifest.titled:
                    break
                sizes = self._columns.read(shard, "title-sizes", local)[local]
                for member, size in zip(members.tolist(), sizes.tolist(), strict=True):
                    titles[member] = texts[member].encode()[:size].decode("utf-8", "replace")
        return [
            Hit(id, float(score), *title_and_snippet(text, title or None), text)
            for id, score, title, text in zip(ids, scores, titles, texts, strict=True)
        ]

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The stored vectors of some rows as float32 [n, E]."""
        result = np.empty((len(rows), self.dimension), np.float32)
        for shard, members, local in self._columns.by_shard(rows):
            table = self._columns.read(shard, "vectors", local).reshape(-1, self.dimension)
            stored = table[local].astype(np.float32)
            if self._calibration is not None:
                mean, scale = self._calibration
                stored = mean + scale * stored * self._columns.read(shard, "scales", local)[local, None]
            result[members] = stored
        return result

    def search(
        self, queries: np.ndarray, k: int, *, block_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k best documents for each query, exactly, on the devices that hold the vectors or the default one.

        Vectors that no device holds are streamed from disk in blocks. Equal scores rank by document id, descending as
        strings, at the cut too, as trec_eval ranks them. Scores are cosines or dot products in float32, at full
        precision.

        Args:
            queries: float [Q, E]; normalised here where the similarity is cosine.
            k: results a query; more than there are documents gives all of them. In a `processes.session` with the
                vectors on the devices of all processes, all of them call this at the same time with the same k; each
                brings its own queries, of which there may be none, and gets the answers to these.
            block_size: rows a block from disk; None takes a power of two that suits the dtype and the dimension.

        Returns:
            scores float32 [Q, min(k, n)] and rows int64 of the same shape, best first.

        Raises:
            InputError: no query, a wrong dimension, NaN or infinity in a query, k or block_size below 1, or damaged
                vectors.
        """
        queries = np.asarray(queries, np.float32)
        together = processes.count() > 1
        if queries.ndim != 2 or not (len(queries) or together):
            raise InputError(f"queries must be of shape [Q, E] with at least one row, not {queries.shape}")
        if queries.shape[1] != self.dimension:
            raise InputError(
                f"queries have {queries.shape[1]} dimensions, but the index {self.dimension}: another model?"
            )
        for name, value in (("k", k), ("block_size", block_size)):
            if value is not None and whole(name, value) < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        broken = ~np.isfinite(queries).all(axis=1)
        if broken.any():
            raise InputError(f"query {int(broken.argmax())} has NaN or infinity in its vector")
        if self.manifest.similarity == "cosine":
            queries = normalized(queries)
        k = min(k, len(self))
        if self._resident is None:
            if not len(queries):
                return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
            return self._search_blocks(queries, k, block_size)
        return self._resident.search(
            queries, k, self.ids, lambda some: self._search_blocks(queries[some], k, block_size)
        )

    def _search_blocks(
        self, queries: np.ndarray, k: int, block_size: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.zeros(len(queries), np.float32)
        if self._calibration is not None:
            mean, scale = self._calibration
            offsets = queries @ mean
            queries = queries * scale
        size = block_size or min(1 << 15, max(1 << 10, BLOCK_ELEMENTS[self.manifest.dtype] // self.dimension))
        if block_size is None:
            size = 1 << (size.bit_length() - 1)
        size = min(size, max(shard.rows for shard in self.manifest.shards))
        return exact_top_k(queries, offsets, self._blocks(size), k, self.ids)

    def _source(self) -> Source:
        def codes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = np.empty((len(rows), self.dimension), np.int8)
            factors = np.empty(len(rows), np.float32)
            for shard, members, local in self._columns.by_shard(rows):
                vectors = self._columns.read(shard, "vectors", local)
                found[members] = vectors.reshape(-1, self.dimension)[local]
                factors[members] = self._columns.read(shard, "scales", local)[local]
            return found, factors

        return Source(
            len(self),
            self.dimension,
            self.manifest.dtype,
            self._calibration,
            lambda positions: self.vectors(self._removed.number_of(positions)),
            lambda positions: codes(self._removed.number_of(positions)),
            self._removed.number_of,
        )

    def _blocks(self, size: int) -> Iterator[Block]:
        """Blocks of ``size`` rows. The last one of a shard begins early, so that it is a full view of the file: a view
        costs no copy, where the device is the CPU.
        """
        for shard in self.manifest.shards:
            for wanted in range(0, shard.rows, size):
                start = max(0, min(wanted, shard.rows - size))
                end = min(start + size, shard.rows)
                rows = slice(start, end)
                vectors = self._columns.read(shard, "vectors", rows).reshape(shard.rows, self.dimension)
                block, factors = vectors[rows], None
                if self._calibration is not None:
                    factors = self._columns.read(shard, "scales", rows)[rows]
                if end - start < size:  # a shard smaller than a block
                    block = np.pad(block, ((0, size - len(block)), (0, 0)))
                    factors = None if factors is None else np.pad(factors, (0, size - len(factors)))
                removed = self._removed.among(shard.start + start, shard.start + start + size)
                yield Block(block, factors, shard.start + start, wanted - start, end - start, removed)
