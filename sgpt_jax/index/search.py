"""Reading and searching an index on disk: memory-mapped, exact, in memory that does not grow with the corpus."""

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import PathLike
from sgpt_jax.index.columns import load_array, normalized, unpack_strings
from sgpt_jax.index.files import CALIBRATION, Manifest, Shard, local_folder
from sgpt_jax.index.topk import Block, exact_top_k

# Elements of a block of vectors. Float32 blocks are views of the file; the others are converted on the device, and on a
# CPU a converted copy that is larger than the caches costs several times the search (100,000 x 768, one query: 460
# instead of 50 ms).
BLOCK_ELEMENTS = {"float32": 1 << 24, "float16": 1 << 22, "int8": 1 << 22}

MAX_MAPPED = 512  # files that are mapped into memory at a time


class Index:
    """A finished index. Rows count from 0 in corpus order."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Looks at the columns that ``manifest`` describes; `Index.open` is the way in for a finished index."""
        self.folder = folder
        self.manifest = manifest
        self._starts = np.array([shard.start for shard in manifest.shards])
        # Mapped columns: each takes a file descriptor, of which a process has about a thousand.
        self._columns: collections.OrderedDict[tuple[int, str], np.ndarray] = collections.OrderedDict()
        for shard in manifest.shards:
            for column in manifest.sizes(shard):
                manifest.check_column(folder, shard, column)
        self._calibration: np.ndarray | None = None
        if manifest.dtype == "int8":
            self._calibration = load_array(folder / CALIBRATION)
            if self._calibration.shape != (2, manifest.dimension):
                raise InputError(f"{folder / CALIBRATION}: is damaged: shape {self._calibration.shape}")

    @classmethod
    def open(cls, folder: PathLike) -> "Index":
        """Opens an index.

        Raises:
            InputError: no index there, one that is unfinished, or files that are missing or cut short.
        """
        path = local_folder(folder)
        manifest = Manifest.load(path)
        if not manifest.complete:
            raise InputError(
                f"{path}: the index is unfinished ({manifest.rows} documents so far); "
                "build it again from the same corpus to go on where it stopped"
            )
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.manifest.dimension

    @property
    def metadata(self) -> dict[str, Any]:
        """What the builder of the index noted (the model, for one)."""
        return self.manifest.metadata

    def info(self) -> dict[str, Any]:
        """Facts for people: documents, dimension, dtype, similarity, bytes, the recall of the stored dtype, metadata.

        ``recall`` is {"queries", "recall@10", "recall@100"} against exact float32 search over the whole corpus, with
        documents of the corpus as queries; None for float32 itself.
        """
        manifest = self.manifest
        sizes: dict[str, int] = {}
        for shard in manifest.shards:
            for column, size in manifest.sizes(shard).items():
                sizes[column] = sizes.get(column, 0) + size
        return {
            "documents": len(self),
            "dimension": self.dimension,
            "dtype": manifest.dtype,
            "similarity": manifest.similarity,
            "texts": manifest.store_texts,
            "bytes": sum(sizes.values()),
            "vector_bytes": sizes.get("vectors", 0) + sizes.get("scales", 0),
            "recall": manifest.recall,
            "metadata": manifest.metadata,
        }

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The document ids of some rows."""
        return self._strings("id", rows)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The document texts of some rows.

        Raises:
            InputError: the index was built without texts.
        """
        if not self.manifest.store_texts:
            raise InputError(f"{self.folder}: this index holds no texts")
        return self._strings("text", rows)

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The stored vectors of some rows as float32 [n, E]."""
        result = np.empty((len(rows), self.dimension), np.float32)
        for shard, members, local in self._by_shard(rows):
            stored = self._column(shard, "vectors").reshape(-1, self.dimension)[local].astype(np.float32)
            if self._calibration is not None:
                mean, scale = self._calibration
                stored = mean + scale * stored * self._column(shard, "scales")[local, None]
            result[members] = stored
        return result

    def search(
        self, queries: np.ndarray, k: int, *, block_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k best documents for each query, exactly, on the default device.

        The vectors are streamed from disk in blocks. Equal scores rank by document id, descending as strings, at the
        cut too, as trec_eval ranks them. Scores are cosines or dot products in float32, at full precision.

        Args:
            queries: float [Q, E]; normalised here where the similarity is cosine.
            k: results a query; more than there are documents gives all of them.
            block_size: rows a block; None takes a power of two that suits the dtype and the dimension.

        Returns:
            scores float32 [Q, min(k, n)] and rows int64 of the same shape, best first.

        Raises:
            InputError: no query, a wrong dimension, NaN or infinity in a query, k below 1, or damaged vectors.
        """
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or not len(queries):
            raise InputError(f"queries must be of shape [Q, E] with at least one row, not {queries.shape}")
        if queries.shape[1] != self.dimension:
            raise InputError(
                f"queries have {queries.shape[1]} dimensions, but the index {self.dimension}: another model?"
            )
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        broken = ~np.isfinite(queries).all(axis=1)
        if broken.any():
            raise InputError(f"query {int(broken.argmax())} has NaN or infinity in its vector")
        if self.manifest.similarity == "cosine":
            queries = normalized(queries)
        offsets = np.zeros(len(queries), np.float32)
        if self._calibration is not None:
            mean, scale = self._calibration
            offsets = queries @ mean
            queries = queries * scale
        size = block_size or min(1 << 15, max(1 << 10, BLOCK_ELEMENTS[self.manifest.dtype] // self.dimension))
        if block_size is None:
            size = 1 << (size.bit_length() - 1)
        size = min(size, max(shard.rows for shard in self.manifest.shards))
        return exact_top_k(queries, offsets, self._blocks(size), min(k, len(self)), self.ids)

    def _blocks(self, size: int) -> Iterator[Block]:
        """Blocks of ``size`` rows. The last one of a shard begins early, so that it is a full view of the file: a view
        costs no copy, where the device is the CPU.
        """
        for shard in self.manifest.shards:
            vectors = self._column(shard, "vectors").reshape(shard.rows, self.dimension)
            scales = self._column(shard, "scales") if self._calibration is not None else None
            for wanted in range(0, shard.rows, size):
                start = max(0, min(wanted, shard.rows - size))
                end = min(start + size, shard.rows)
                block, factors = vectors[start:end], None if scales is None else scales[start:end]
                if end - start < size:  # a shard smaller than a block
                    block = np.pad(block, ((0, size - len(block)), (0, 0)))
                    factors = None if factors is None else np.pad(factors, (0, size - len(factors)))
                yield Block(block, factors, shard.start + start, wanted - start, end - start)

    def _column(self, shard: Shard, column: str) -> np.ndarray:
        key = (shard.start, column)
        if key not in self._columns:
            if len(self._columns) >= MAX_MAPPED:
                self._columns.popitem(last=False)  # whoever still uses it keeps it alive
            self._columns[key] = self.manifest.read_column(self.folder, shard, column)
        self._columns.move_to_end(key)
        return self._columns[key]

    def _by_shard(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """For each shard that holds some of the rows: the shard, which of the rows, and their numbers in it."""
        wanted = np.asarray(rows, np.int64)
        outside = (wanted < 0) | (wanted >= len(self))
        if outside.any():
            raise IndexError(f"row {wanted[outside][0]} of an index with {len(self)} documents")
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(numbers):
            shard = self.manifest.shards[number]
            members = np.flatnonzero(numbers == number)
            yield shard, members, wanted[members] - shard.start

    def _strings(self, name: str, rows: Sequence[int] | np.ndarray) -> list[str]:
        result = [""] * len(rows)
        for shard, members, local in self._by_shard(rows):
            blob, ends = self._column(shard, f"{name}s"), self._column(shard, f"{name}-ends")
            for member, string in zip(members.tolist(), unpack_strings(blob, ends, local), strict=True):
                result[member] = string
        return result
