"""What an index is on disk: a manifest, and columns of raw bytes in shards that only ever grow at their end.

    manifest.json                            what the columns hold; the only file that says what counts
    calibration.npy                          int8 alone: mean and scale of each dimension, [2, E] float32
    <first row>-<last row + 1>.<column>      one file for each shard and column, little-endian, rows in corpus order
        vectors [n, E]; scales [n] float32 (int8 alone); ids, texts: UTF-8; id-ends, text-ends [n] uint64

Rows are added by appending to the columns, then replacing the manifest. What lies behind the sizes that the
manifest gives was never finished: readers do not look at it and the next writer cuts it off.
"""

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sgpt_jax.files import InputError, PathLike, atomic_write, dump_json, fix_surrogates, write_json

MANIFEST = "manifest.json"
CALIBRATION = "calibration.npy"
FORMAT = "sgpt-jax index 1"

Dtype = Literal["float32", "float16", "int8"]
Similarity = Literal["cosine", "dot"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
}


@dataclass
class Shard:
    """Rows ``[start, start + rows)``, and how many bytes their ids and texts take."""

    start: int
    rows: int = 0
    id_bytes: int = 0
    text_bytes: int = 0


@dataclass
class Manifest:
    """Everything about an index but its rows. The first part is fixed when the index is begun."""

    dtype: str
    similarity: str
    chunk_size: int
    shard_size: int
    store_texts: bool
    metadata: dict[str, Any]
    format: str = FORMAT
    dimension: int = 0
    fingerprint: str = ""  # SHA-256 over the ids and texts of all rows
    complete: bool = False
    recall: dict[str, float] | None = None
    shards: list[Shard] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many documents are in the index."""
        return sum(shard.rows for shard in self.shards)

    def plain(self) -> dict[str, Any]:
        """The manifest as JSON would give it back."""
        return json.loads(dump_json(asdict(self), None))

    def save(self, folder: Path) -> None:
        """Replaces the manifest in ``folder`` and makes that last through a power cut."""
        write_json(folder / MANIFEST, asdict(self))
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads the manifest of ``folder``.

        Raises:
            InputError: there is none, or it is not one of this format.
        """
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{folder}: is no index: {MANIFEST} cannot be read: {reason}") from error
        try:
            value = json.loads(raw)
            shards = [Shard(**shard) for shard in value.pop("shards")]
            manifest = cls(**value, shards=shards)
            numbers = [number for shard in shards for number in asdict(shard).values()]
            numbers += [manifest.dimension, manifest.chunk_size, manifest.shard_size]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError("sizes must be integers")
            starts = [0, *np.cumsum([shard.rows for shard in shards]).tolist()]
            if [shard.start for shard in shards] != starts[:-1]:
                raise ValueError("shards do not follow each other")
            if manifest.format != FORMAT or manifest.dtype not in DTYPES:
                raise ValueError(f"format {manifest.format!r}, dtype {manifest.dtype!r}")
            if manifest.complete and not manifest.rows:
                raise ValueError("complete without a document")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: is damaged, or no index of this version: {error}") from error
        return manifest

    def path(self, folder: Path, shard: Shard, column: str) -> Path:
        """The file of one column of one shard."""
        return folder / f"{shard.start:012d}-{shard.start + self.shard_size:012d}.{column}"

    def sizes(self, shard: Shard) -> dict[str, int]:
        """The bytes that count in each column of a shard."""
        sizes = {
            "vectors": shard.rows * self.dimension * DTYPES[self.dtype].itemsize,
            "ids": shard.id_bytes,
            "id-ends": shard.rows * 8,
        }
        if self.dtype == "int8":
            sizes["scales"] = shard.rows * 4
        if self.store_texts:
            sizes |= {"texts": shard.text_bytes, "text-ends": shard.rows * 8}
        return sizes

    def append(self, folder: Path, columns: Mapping[str, bytes], rows: int) -> None:
        """Adds rows behind the last one, in the shard where they belong; call `save` to make them count."""
        if not self.shards or self.shards[-1].rows == self.shard_size:
            self.shards.append(Shard(self.rows))
        shard = self.shards[-1]
        for column, size in self.sizes(shard).items():
            path = self.path(folder, shard, column)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                with open(descriptor, "r+b") as stream:
                    if os.fstat(descriptor).st_size < size:
                        raise InputError(f"{path}: is cut short: {size} bytes are needed")
                    stream.truncate(size)
                    stream.seek(size)
                    stream.write(columns[column])
                    stream.flush()
                    os.fsync(descriptor)
            except OSError as error:
                raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        shard.rows += rows
        shard.id_bytes += len(columns["ids"])
        shard.text_bytes += len(columns.get("texts", b""))

    def read_column(self, folder: Path, shard: Shard, column: str) -> np.ndarray:
        """One column as a flat read-only array over the file itself (nothing is read before it is used).

        Raises:
            InputError: the file is not there or shorter than the manifest says.
        """
        path = self.path(folder, shard, column)
        size = self.sizes(shard)[column]
        dtype = {"vectors": DTYPES[self.dtype], "scales": np.dtype("<f4")}.get(column)
        if dtype is None:
            dtype = np.dtype("<u8") if column.endswith("-ends") else np.dtype("u1")
        try:
            with path.open("rb") as stream:
                actual = os.fstat(stream.fileno()).st_size
                if actual < size:
                    raise InputError(f"{path}: is cut short: {actual} bytes, but {size} are needed")
                if not size:
                    return np.zeros(0, dtype)
                mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        return np.frombuffer(mapped, dtype)


def pack_strings(values: Sequence[str], start: int, name: str) -> dict[str, bytes]:
    """The columns ``{name}s`` and ``{name}-ends`` of some strings, where the column has ``start`` bytes already."""
    encoded = [value.encode("utf-8") for value in values]
    ends = np.cumsum([len(value) for value in encoded], dtype=np.uint64) + np.uint64(start)
    return {f"{name}s": b"".join(encoded), f"{name}-ends": ends.astype("<u8").tobytes()}


def unpack_strings(blob: np.ndarray, ends: np.ndarray, places: np.ndarray) -> list[str]:
    """The strings at some places of two columns.

    Raises:
        InputError: the columns contradict each other.
    """
    stops = ends[places].astype(np.int64)
    starts = np.where(places > 0, ends[places - 1], 0).astype(np.int64)
    if ((starts < 0) | (starts > stops) | (stops > len(blob))).any():
        raise InputError("the index is damaged: strings end where there are none")
    view = memoryview(blob.data)
    try:
        return [
            str(view[start:stop], "utf-8")
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        ]
    except UnicodeDecodeError as error:
        raise InputError(f"the index is damaged: {error}") from error


def calibrate(vectors: np.ndarray) -> np.ndarray:
    """Mean and scale of each dimension for int8, [2, E] float32, from the first rows of an index [n, E].

    Decoders give vectors with a large common part and some dimensions far wider than others: the mean is taken
    off, and the wide dimensions get wider steps, so that narrow ones keep some. The scale is the square root of
    the standard deviation: of the powers from 0 to 1 it loses the least (SmolLM2-135M, recall@10 0.99, against
    0.95 with one scale a vector and nothing else). The variance is drawn towards the average of all dimensions
    as far as the rows are few.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    variance = vectors.var(axis=0, dtype=np.float64)
    prior = 32.0
    scale = np.power((len(vectors) * variance + prior * variance.mean()) / (len(vectors) + prior), 0.25)
    if not scale.all():  # a single row, or all rows the same
        scale = np.ones_like(mean)
    return np.stack([mean, scale]).astype(np.float32)


def quantize(vectors: np.ndarray, calibration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [n, E] and one float32 factor a row: ``vector = mean + scale * factor * code``, about."""
    centred = (vectors - calibration[0]) / calibration[1]
    factors = np.abs(centred).max(axis=1) / np.float32(127)
    codes = np.rint(centred / np.where(factors, factors, np.float32(1))[:, None])
    return codes.astype(np.int8), factors.astype(np.float32)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays."""
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1, keepdims=True))
    return (vectors / np.where(lengths, lengths, 1.0)).astype(np.float32)


def check_id(id: str, position: int) -> str:
    """The id itself.

    Raises:
        InputError: it is empty or holds a lone surrogate.
    """
    if not id or fix_surrogates(id) != id:
        raise InputError(f"document {position}: the id {id!r} is empty or holds a lone surrogate")
    return id


def local_folder(folder: PathLike) -> Path:
    """The folder of an index as a path.

    Raises:
        InputError: it is on a remote file system, whose files cannot be mapped into memory.
    """
    name = os.fspath(folder)
    if "://" in name:
        raise InputError(f"{name}: an index is mapped into memory and must be in a local folder")
    return Path(name)


def save_array(path: Path, value: np.ndarray) -> None:
    """Writes one array as .npy, atomically."""
    with atomic_write(path) as stream:
        np.save(stream, value)


def load_array(path: Path) -> np.ndarray:
    """Reads what `save_array` wrote.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder (made when it is not there) for one writer; the hold ends with the process, however it ends.

    Temporary files of a writer that was killed are removed, and so is a folder made here that stays empty.

    Raises:
        InputError: another process writes the index, or the folder cannot be made.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing this index") from None
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()
        yield
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        os.close(descriptor)
