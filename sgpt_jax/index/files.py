"""What an index is on disk: a manifest, and columns of raw bytes in shards, of which none changes once it counts.

    manifest.json                            what the columns hold, and by which model; when it is complete, it alone
                                             says what counts
    calibration.npy                          int8 alone: mean and scale of each dimension, [2, E] float32
    <first row>-<row behind it>.<column>     one file for each shard and column, little-endian, rows in corpus order
        vectors [n, E]; scales [n] float32 (int8 alone); ids, texts: UTF-8; id-ends, text-ends [n] uint64;
        title-sizes [n] uint32: how many bytes of a text, from its beginning, are the title;
        checks: for each chunk of rows the `checksum` of what it added to the other columns, in the order of `sizes`
    removed-<how many>.rows                  the rows that were removed, ascending, uint64
    compacted-<generation>/                  shards and removed rows of an index that was compacted, in place of those
                                             beside the manifest

and while it is being built, grows or is being compacted (`writing`, `change`):

    growing.json                             the manifest that will take the place of the one that is there
    <...>.json                               what the columns of a shard hold so far
    <...>.last.json                          the same with the rows of a last chunk that is not full
    recall.npz, <...>.<rows>.npz             the queries that measure recall, and what was found for them (`recall`)

Every shard has one writer, and what is added at a time makes shards that are full but for the last: what the files hold
does not depend on how many processes write them. Rows are added by appending to the columns, then replacing the shard's
JSON. What lies behind the sizes that it gives was never finished: readers do not look at it and the next writer cuts it
off.
"""

import json
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import PathLike, dump_json, parse_json, write_json
from sgpt_jax.index import schema
from sgpt_jax.index.checksum import checksum
from sgpt_jax.index.schema import FORMAT, UNCHECKED_FORMAT, UNTITLED_FORMAT

MANIFEST = "manifest.json"
GROWING = "growing.json"
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

    ``fingerprint`` is that of the model, or empty; ``calibration`` is the CRC-32 of calibration.npy; ``removed`` is the
    number of removed rows and the CRC-32 of their file, or None; ``generation`` counts how often it was compacted.
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
    generation: int = 0
    removed: dict[str, int] | None = None
    shards: list[Shard] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows the shards have, those of removed documents too."""
        return sum(shard.rows for shard in self.shards)

    @property
    def checked(self) -> bool:
        """Whether there are checksums: an index of the first version has none."""
        return self.format != UNCHECKED_FORMAT

    @property
    def titled(self) -> bool:
        """Whether it is of this version, which knows titles and can grow."""
        return self.format == FORMAT

    def plain(self) -> dict[str, Any]:
        """The manifest as JSON would give it back."""
        return json.loads(dump_json(asdict(self), None))

    def save(self, folder: Path, name: str = MANIFEST) -> None:
        """Replaces the manifest in ``folder``, or `GROWING`, and makes that last through a power cut."""
        _write_checked(folder / name, asdict(self))

    @classmethod
    def load(cls, folder: Path, name: str = MANIFEST, *, written: bool = True) -> "Manifest":
        """Reads the manifest of ``folder``, or `GROWING`.

        Args:
            folder: of the index.
            name: of the file.
            written: of an unfinished one, with the shards that are being written; there may be gaps between them.

        Raises:
            InputError: there is none, or it is not one of this format, or damaged.
        """
        path = folder / name
        try:
            raw = path.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{folder}: is no index: {name} cannot be read: {reason}") from error
        try:
            value = parse_json(raw.decode("utf-8"))
            unchecked = isinstance(value, dict) and value.get("format") == UNCHECKED_FORMAT
            crc = _crc_of(value)
            known = _from_old(value)
            schema.check(known, schema.MANIFEST)
            shards = [_shard(shard) for shard in known["shards"]]
            manifest = cls(**{**known, "shards": shards})
            manifest.check_consistency()
            if not unchecked or crc is not None:
                _check_crc(value, crc)
        except ValueError as error:
            raise InputError(f"{path}: is damaged, or no index of this version: {error}") from error
        if written and not manifest.complete:
            manifest.shards += manifest.load_shards(folder)
        return manifest

    def check_consistency(self) -> None:
        """Raises ValueError when values contradict each other, or shards do not follow each other from row 0 on."""
        if self.shard_size % self.chunk_size:
            raise ValueError(f"shard_size {self.shard_size} is no multiple of chunk_size {self.chunk_size}")
        start = 0
        for shard in self.shards:
            if shard.start != start or not 0 < shard.rows <= self.shard_size:
                raise ValueError(f"shards do not follow each other at row {shard.start}")
            start += shard.rows
        if self.complete and not (self.shards and self.dimension):
            raise ValueError("complete without a document")
        if self.complete and self.checked and (self.calibration is None) == (self.dtype == "int8"):
            raise ValueError(f"calibration is {self.calibration} for dtype {self.dtype}")
        if self.complete and self.removed is not None and not 0 < self.removed["rows"] < self.rows:
            raise ValueError(f"removed is {self.removed} of {self.rows} rows")

    def load_shards(self, folder: Path, *, last: bool = False) -> list[Shard]:
        """The shards that are being written as their own files tell, by row.

        Args:
            folder: of the index.
            last: with the rows of a last chunk that is not full.

        Raises:
            InputError: such a file is damaged.
        """
        found = {}
        there = self.shard_folder(folder).glob("[0-9]*-[0-9]*.json")
        paths = sorted(there, key=lambda path: path.name.endswith(".last.json"))
        for path in paths:
            if path.name.endswith(".last.json") and not last:
                continue
            try:
                value = parse_json(path.read_bytes().decode("utf-8"))
                crc = _crc_of(value)
                shard = _shard(value)
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
        for path in self.shard_folder(folder).glob("[0-9]*-[0-9]*" + (".last.json" if last else ".json")):
            path.unlink()

    def shard_folder(self, folder: Path) -> Path:
        """Where the shards lie."""
        return folder / f"compacted-{self.generation}" if self.generation else folder

    def path(self, folder: Path, shard: Shard, column: str) -> Path:
        """The file of one column of one shard."""
        return self.shard_folder(folder) / f"{shard.start:012d}-{shard.start + self.shard_size:012d}.{column}"

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
            if self.titled:
                sizes["title-sizes"] = shard.rows * 4
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
            "title-sizes": np.dtype("<u4"),
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
    """A manifest of an earlier format with what it lacks at the values that mean so; any other as it is."""
    if not isinstance(value, dict) or value.get("format") not in (UNCHECKED_FORMAT, UNTITLED_FORMAT):
        return value
    value = {**value, "generation": 0, "removed": None}
    if value["format"] == UNCHECKED_FORMAT:
        shards = value.get("shards")
        if isinstance(shards, list):
            shards = [{**shard, "checks": 0} if isinstance(shard, dict) else shard for shard in shards]
        value |= {"shards": shards, "fingerprint": "", "calibration": None}
    return value


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
