"""The columns of an index as arrays over their files, each chunk of rows checked against its checksum when it is first
looked at."""

import collections
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.index.checksum import checksum
from sgpt_jax.index.columns import unpack_strings
from sgpt_jax.index.files import Manifest, Shard

MAX_MAPPED = 512  # files that are mapped into memory at a time


class Columns:
    """Reads the columns that a manifest describes.

    Args:
        folder: of the index.
        manifest: of the index.

    Raises:
        InputError: a file is missing or cut short.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._starts = np.array([shard.start for shard in manifest.shards])
        # Mapped columns: each takes a file descriptor, of which a process has about a thousand.
        self._mapped: collections.OrderedDict[tuple[int, str], np.ndarray] = collections.OrderedDict()
        self._checks: dict[int, np.ndarray] = {}  # first row of a shard -> [chunks, columns]
        self._sound: dict[tuple[int, str], np.ndarray] = {}  # which chunks are known to fit their checksums
        for shard in manifest.shards:
            for column in manifest.sizes(shard):
                manifest.check_column(folder, shard, column)

    def read(self, shard: Shard, column: str, rows: np.ndarray | slice = np.s_[:]) -> np.ndarray:
        """A whole column, of which the chunks that hold ``rows`` of the shard were checked.

        Returns:
            the file's values, flat and read-only; of ids and texts their bytes.

        Raises:
            InputError: the file cannot be read, or those rows are damaged.
        """
        values = self._map(shard, column)
        if self._manifest.checked:
            size = self._manifest.chunk_size
            if isinstance(rows, slice):
                first, last, _ = rows.indices(shard.rows)
                self._check(shard, column, range(first // size, -(-last // size)), values)
            else:
                self._check(shard, column, np.unique(rows // size).tolist(), values)
        return values

    def strings(self, name: str, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The strings of some rows, from the columns ``{name}s`` and ``{name}-ends``.

        Raises:
            InputError: see `read`; the columns contradict each other.
        """
        result = [""] * len(rows)
        for shard, members, local in self.by_shard(rows):
            ends = self.read(shard, f"{name}-ends", np.concatenate([local, np.maximum(local - 1, 0)]))
            blob = self.read(shard, f"{name}s", local)
            try:
                found = unpack_strings(blob, ends, local)
            except InputError as error:
                path = self._manifest.path(self._folder, shard, f"{name}-ends")
                raise InputError(f"{path}: {error}") from error
            for member, string in zip(members.tolist(), found, strict=True):
                result[member] = string
        return result

    def by_shard(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """For each shard that holds some of the rows: the shard, which of the rows, and their numbers in it.

        Raises:
            IndexError: there is no such row.
            InputError: the rows are no series of whole numbers.
        """
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise InputError(
                f"rows must be a series of whole numbers, not {wanted.dtype} of shape {wanted.shape}"
            )
        wanted = wanted.astype(np.int64)
        outside = (wanted < 0) | (wanted >= self._manifest.rows)
        if outside.any():
            raise IndexError(f"row {wanted[outside][0]} of an index with {self._manifest.rows} documents")
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(numbers):
            shard = self._manifest.shards[number]
            members = np.flatnonzero(numbers == number)
            yield shard, members, wanted[members] - shard.start

    def _map(self, shard: Shard, column: str) -> np.ndarray:
        key = (shard.start, column)
        if key not in self._mapped:
            if len(self._mapped) >= MAX_MAPPED:
                self._mapped.popitem(last=False)  # whoever still uses it keeps it alive
            self._mapped[key] = self._manifest.read_column(self._folder, shard, column)
        self._mapped.move_to_end(key)
        return self._mapped[key]

    def _check(self, shard: Shard, column: str, chunks: Sequence[int], values: np.ndarray) -> None:
        """Checks chunks of a column that were not checked before."""
        size = self._manifest.chunk_size
        sound = self._sound.setdefault((shard.start, column), np.zeros(-(-shard.rows // size), bool))
        names = [name for name in self._manifest.sizes(shard) if name != "checks"]
        for chunk in chunks:
            if sound[chunk]:
                continue
            first, last = chunk * size, min((chunk + 1) * size, shard.rows)
            begin, end = self._span(shard, column, first, last, len(values))
            if (
                not 0 <= begin <= end <= len(values)
                or checksum(values[begin:end]) != (self._sums(shard, len(names))[chunk, names.index(column)])
            ):
                raise InputError(
                    f"{self._manifest.path(self._folder, shard, column)}: is damaged: what it holds for documents "
                    f"{shard.start + first} to {shard.start + last - 1} does not fit its checksum"
                )
            sound[chunk] = True

    def _span(self, shard: Shard, column: str, first: int, last: int, length: int) -> tuple[int, int]:
        """Where rows ``[first, last)`` lie in a column of ``length`` values."""
        if column not in ("ids", "texts"):
            width = length // shard.rows
            return first * width, last * width
        bounds = np.array([first - 1, last - 1]) if first else np.array([last - 1])
        stops = self.read(shard, f"{column[:-1]}-ends", bounds)[bounds].tolist()
        return (stops[0], stops[1]) if first else (0, stops[0])

    def _sums(self, shard: Shard, columns: int) -> np.ndarray:
        if shard.start not in self._checks:
            values = self._manifest.read_column(self._folder, shard, "checks")
            if zlib.crc32(values.data) != shard.checks:
                path = self._manifest.path(self._folder, shard, "checks")
                raise InputError(f"{path}: is damaged: it does not fit its checksum in the manifest")
            self._checks[shard.start] = values.reshape(-1, columns)
        return self._checks[shard.start]
