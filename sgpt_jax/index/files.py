"""What an index is on disk: a manifest, and columns of raw bytes in shards that only ever grow at their end.

    manifest.json                            what the columns hold, and by which model; when it is complete, it alone
                                             says what counts
    calibration.npy                          int8 alone: mean and scale of each dimension, [2, E] float32
    <first row>-<last row + 1>.<column>      one file for each shard and column, little-endian, rows in corpus order
        vectors [n, E]; scales [n] float32 (int8 alone); ids, texts: UTF-8; id-ends, text-ends [n] uint64;
        checks: for each chunk of rows the `checksum` of what it added to the other columns, in the order of `sizes`

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
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import PathLike, dump_json, parse_json, write_json
from sgpt_jax.index import schema
from sgpt_jax.index.checksum import checksum
from sgpt_jax.index.schema import FORMAT, OLD_FORMAT

MANIFEST = "manifest.json"
CALIBRATION = "calibration.npy"

Dtype = Literal["float32", "float16", "int8"]
Similarity = Literal["cosine", "dot"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
}


@dataclass
class Shard:
    """Rows ``[start, start + rows)``, how many bytes their ids and texts take, and the SHA-256 of those.

    ``checks`` is the CRC-32 of the column of that name.
    """

    start: int
    rows: int = 0
    id_bytes: int = 0
    text_bytes: int = 0
    fingerprint: str = ""
    checks: int = 0


@dataclass
class Manifest:
    """Everything about an index but its rows. The first part is fixed when the index is begun.

    ``fingerprint`` is that of the model, or empty; ``calibration`` is the CRC-32 of calibration.npy.
    """

    dtype: str
    similarity: str
    chunk_size: int
    shard_size: int
    store_texts: bool
    metadata: dict[str, Any]
    fingerprint: str = ""
    format: str = FORMAT
    dimension: int = 0
    calibration: int | None = None
    complete: bool = False
    recall: dict[str, float] | None = None
    shards: list[Shard] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many documents are in the index."""
        return sum(shard.rows for shard in self.shards)

    @property
    def checked(self) -> bool:
        """Whether there are checksums: an index of an earlier version has none."""
        return self.format != OLD_FORMAT

    def plain(self) -> dict[str, Any]:
        """The manifest as JSON would give it back."""
        return json.loads(dump_json(asdict(self), None))

    def save(self, folder: Path) -> None:
        """Replaces the manifest in ``folder`` and makes that last through a power cut."""
        _write_checked(folder / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads the manifest of ``folder``; the shards of an unfinished index may have gaps between them.

        Raises:
            InputError: there is none, or it is not one of this format, or damaged.
        """
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{folder}: is no index: {MANIFEST} cannot be read: {reason}") from error
        try:
            value = parse_json(raw.decode("utf-8"))
            old = isinstance(value, dict) and value.get("format") == OLD_FORMAT
            crc = _crc_of(value)
            known = _from_old(value) if old else value
            schema.check(known, schema.MANIFEST)
            shards = [_shard(shard) for shard in known["shards"]]
            manifest = cls(**{**known, "shards": shards})
            manifest.check_consistency()
            if not old or crc is not None:
                _check_crc(value, crc)
        except ValueError as error:
            raise InputError(f"{path}: is damaged, or no index of this version: {error}") from error
        if not manifest.complete:
            manifest.shards = manifest.load_shards(folder)
        return manifest

    def check_consistency(self) -> None:
        """Raises ValueError when values contradict each other, or shards do not follow each other from row 0 on."""
        if self.shard_size % self.chunk_size:
            raise ValueError(f"shard_size {self.shard_size} is no multiple of chunk_size {self.chunk_size}")
        start = 0
        for shard in self.shards:
            if shard.start != start or start % self.shard_size or not 0 < shard.rows <= self.shard_size:
                raise ValueError(f"shards do not follow each other at row {shard.start}")
            start += shard.rows
        if self.complete and not (self.shards and self.dimension):
            raise ValueError("complete without a document")
        if self.complete and self.checked and (self.calibration is None) == (self.dtype == "int8"):
            raise ValueError(f"calibration is {self.calibration} for dtype {self.dtype}")

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
                value = parse_json(path.read_bytes().decode("utf-8"))
                crc = _crc_of(value)
                shard = _shard(value if self.checked else _from_old(value))
                if self.checked:
                    _check_crc(value, crc)
                if path.name.split(".")[0] != self.path(folder, shard, "x").name.split(".")[0]:
                    raise ValueError(f"it starts at {shard.start}")
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: is damaged: {error}") from error
            found[shard.start] = shard
        return [found[start] for start in sorted(found)]

    def save_shard(self, folder: Path, shard: Shard, *, last: bool = False) -> None:
        """Makes the rows of a shard count; ``last``: beside those of its full chunks."""
        _write_checked(self.path(folder, shard, "last.json" if last else "json"), asdict(shard))

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
        if self.checked:
            sizes["checks"] = -(-shard.rows // self.chunk_size) * len(sizes) * 4
        return sizes

    def append(self, folder: Path, shard: Shard, columns: Mapping[str, bytes], rows: int) -> None:
        """Adds a chunk to a shard behind those it has; call `save_shard` to make it count."""
        sizes = self.sizes(shard)
        sums = [checksum(columns[column]) for column in sizes if column != "checks"]
        checks = np.array(sums, "<u4").tobytes()
        columns = {**columns, "checks": checks}
        for column, size in sizes.items():
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
        shard.checks = zlib.crc32(checks, shard.checks)

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
        dtype = {
            "vectors": DTYPES[self.dtype],
            "scales": np.dtype("<f4"),
            "checks": np.dtype("<u4"),
        }.get(column)
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


def _shard(value: Any) -> Shard:
    schema.check(value, schema.SHARD)
    return Shard(**value)


def _from_old(value: Any) -> Any:
    """A manifest or shard of the format before this one, with what it lacks at the values that mean so."""
    if not isinstance(value, dict):
        return value
    if "start" in value:
        return {**value, "checks": 0}
    shards = value.get("shards")
    if isinstance(shards, list):
        value = {**value, "shards": [_from_old(shard) for shard in shards]}
    return {**value, "fingerprint": "", "calibration": None}


def _crc_of(value: Any) -> Any:
    """Takes the checksum out of what `_write_checked` wrote."""
    return value.pop("crc32", None) if isinstance(value, dict) else None


def _check_crc(value: dict[str, Any], found: Any) -> None:
    if found != zlib.crc32(dump_json(value, None)):
        raise ValueError("its checksum does not fit it")


def _write_checked(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file, which has a checksum of the rest then, and makes that last through a power cut."""
    value = json.loads(dump_json(value, None))
    write_json(path, {**value, "crc32": zlib.crc32(dump_json(value, None))})
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
