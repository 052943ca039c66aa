"""What an index is on disk: a manifest, and columns of raw bytes in shards that only ever grow at their end.

    manifest.json                            what the columns hold; when it is complete, it alone says what counts
    calibration.npy                          int8 alone: mean and scale of each dimension, [2, E] float32
    <first row>-<last row + 1>.<column>      one file for each shard and column, little-endian, rows in corpus order
        vectors [n, E]; scales [n] float32 (int8 alone); ids, texts: UTF-8; id-ends, text-ends [n] uint64

and while it is being built (`index_build`):

    <first row>-<last row + 1>.json          what the columns of a shard hold so far
    <first row>-<last row + 1>.last.json     the same with the rows of a last chunk that is not full
    recall.npz, <...>.<rows>.npz             the queries that measure recall, and what was found for them (`recall`)

Every shard has one writer, and all shards but the last have the same number of rows: what the files hold does not
depend on how many processes write them. Rows are added by appending to the columns, then replacing the shard's JSON.
What lies behind the sizes that it gives was never finished: readers do not look at it and the next writer cuts it off.
"""

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import PathLike, dump_json, write_json

MANIFEST = "manifest.json"
CALIBRATION = "calibration.npy"
FORMAT = "sgpt-jax index 2"

Dtype = Literal["float32", "float16", "int8"]
Similarity = Literal["cosine", "dot"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
}


@dataclass
class Shard:
    """Rows ``[start, start + rows)``, how many bytes their ids and texts take, and the SHA-256 of those."""

    start: int
    rows: int = 0
    id_bytes: int = 0
    text_bytes: int = 0
    fingerprint: str = ""

    @classmethod
    def read(cls, value: Any) -> "Shard":
        """A shard from its JSON.

        Raises:
            ValueError, TypeError: it makes no sense.
        """
        shard = cls(**value)
        numbers = (shard.start, shard.rows, shard.id_bytes, shard.text_bytes)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("sizes must be integers")
        return shard


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
        _write_lasting(folder / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads the manifest of ``folder``; the shards of an unfinished index may have gaps between them.

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
            shards = [Shard.read(shard) for shard in value.pop("shards")]
            manifest = cls(**value, shards=shards)
            numbers = [manifest.dimension, manifest.chunk_size, manifest.shard_size]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError("sizes must be integers")
            manifest.check_order()
            if manifest.format != FORMAT or manifest.dtype not in DTYPES:
                raise ValueError(f"format {manifest.format!r}, dtype {manifest.dtype!r}")
            if manifest.complete and not manifest.rows:
                raise ValueError("complete without a document")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: is damaged, or no index of this version: {error}") from error
        if not manifest.complete:
            manifest.shards = manifest.load_shards(folder)
        return manifest

    def check_order(self) -> None:
        """Raises ValueError when the shards do not follow each other from row 0 on."""
        starts = [0, *np.cumsum([shard.rows for shard in self.shards]).tolist()]
        if [shard.start for shard in self.shards] != starts[:-1]:
            raise ValueError("shards do not follow each other")

    def load_shards(self, folder: Path, *, last: bool = False) -> list[Shard]:
        """The shards of an unfinished index as their own files tell, by row.

        Args:
            folder: of the index.
            last: with the rows of a last chunk that is not full.

        Raises:
            InputError: such a file is damaged.
        """
        found = {}
        paths = sorted(folder.glob("[0-9]*-[0-9]*.json"), key=lambda path: path.name.endswith(".last.json"))
        for path in paths:
            if path.name.endswith(".last.json") and not last:
                continue
            try:
                shard = Shard.read(json.loads(path.read_bytes()))
                if path.name.split(".")[0] != self.path(folder, shard, "x").name.split(".")[0]:
                    raise ValueError(f"it starts at {shard.start}")
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{path}: is damaged: {error}") from error
            found[shard.start] = shard
        return [found[start] for start in sorted(found)]

    def save_shard(self, folder: Path, shard: Shard, *, last: bool = False) -> None:
        """Makes the rows of a shard count; ``last``: beside those of its full chunks."""
        _write_lasting(self.path(folder, shard, "last.json" if last else "json"), asdict(shard))

    def remove_shard_files(self, folder: Path, *, last: bool = False) -> None:
        """Removes what `save_shard` wrote; ``last``: only what it wrote so."""
        for path in folder.glob("[0-9]*-[0-9]*" + (".last.json" if last else ".json")):
            path.unlink()

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

    def append(self, folder: Path, shard: Shard, columns: Mapping[str, bytes], rows: int) -> None:
        """Adds rows to a shard behind those it has; call `save_shard` to make them count."""
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

    def check_column(self, folder: Path, shard: Shard, column: str) -> None:
        """Raises InputError when a column's file is not there or shorter than the manifest says."""
        path, size = self.path(folder, shard, column), self.sizes(shard)[column]
        try:
            actual = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        if actual < size:
            raise InputError(f"{path}: is cut short: {actual} bytes, but {size} are needed")

    def read_column(self, folder: Path, shard: Shard, column: str) -> np.ndarray:
        """One column as a flat read-only array over the file itself (nothing is read before it is used).

        Raises:
            InputError: the file is not there or shorter than the manifest says.
        """
        self.check_column(folder, shard, column)
        path, size = self.path(folder, shard, column), self.sizes(shard)[column]
        dtype = {"vectors": DTYPES[self.dtype], "scales": np.dtype("<f4")}.get(column)
        if dtype is None:
            dtype = np.dtype("<u8") if column.endswith("-ends") else np.dtype("u1")
        try:
            if not size:
                return np.zeros(0, dtype)
            with path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        return np.frombuffer(mapped, dtype)


def local_folder(folder: PathLike) -> Path:
    """The folder of an index as a path.

    Raises:
        InputError: it is on a remote file system, whose files cannot be mapped into memory.
    """
    name = os.fspath(folder)
    if "://" in name:
        raise InputError(f"{name}: an index is mapped into memory and must be in a local folder")
    return Path(name)


def _write_lasting(path: Path, value: Any) -> None:
    """Replaces a JSON file and makes that last through a power cut."""
    write_json(path, value)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_writer(folder: Path, *, leader: bool = True, shared: bool = False) -> Iterator[Callable[[], None]]:
    """Holds the folder (made when it is not there) for one build; the hold ends with the process, however it ends.

    Temporary files of a writer that was killed are removed, and so is a folder made here that stays empty.

    Args:
        folder: of the index.
        leader: the only process of the build, or the first of several. The others must not come before it is through.
        shared: other processes of the build will write, too.

    Yields:
        what the leader calls when its preparations are done, to let the others in.

    Raises:
        InputError: another build writes the index, or the folder cannot be made.
    """
    made = leader and not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error

    def let_in() -> None:
        if shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    try:
        try:
            # Alone first: a process that is left over from an earlier, broken build holds it still.
            fcntl.flock(descriptor, (fcntl.LOCK_EX if leader else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing this index") from None
        if leader:
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
        yield let_in
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        os.close(descriptor)
