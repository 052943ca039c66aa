"""Corpora of many or large files, by row: counted once, then read where they are needed.

A corpus is cut into parts that can be read by themselves: 16 MB of lines of a file of JSON lines, a row group of
Parquet, rows of a data set of the hub, any other file (compressed, CSV, TSV, text, JSON array) as a whole. Counting
reads each part once, in one of the processes, checks every record, and notes two hashes of each; these tell which
records repeat an earlier one and are left out. From then on the documents have rows, and each process reads those
that it wants.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import DOCUMENT
from sgpt_jax.files.corpora import NO_ID, Document, Record, hash_of, named_record, read_records
from sgpt_jax.files.gaps import Gaps
from sgpt_jax.files.hub_tables import is_hub, read_span, rows_of
from sgpt_jax.files.lines import (
    MAX_LINE_BYTES,
    LineError,
    PathLike,
    ReadReport,
    atomic_write,
    line_error,
    lines_before,
    read_lines,
)
from sgpt_jax.files.parquet import is_parquet, read_row_group, row_groups
from sgpt_jax.files.tables import FOREIGN, Format, has_records, is_json_lines, is_plain_text
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.progress import progress

PART_BYTES = 1 << 24
PART_ROWS = 1 << 15  # of a data set of the hub
_SLICES = 16  # of the hashes that are compared at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """What can be read by itself: bytes or a row group of a file, rows of a data set of the hub, or all of a file;
    of one of plain text ``before`` is how many lines those before it have."""

    path: str
    span: tuple[int, int] | None = None
    group: int | None = None
    rows: tuple[int, int] | None = None
    before: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read, see `read_corpus`."""

    format: Format | None = None
    errors: str = "strict"
    skip_bad_lines: bool = False
    max_bytes: int = MAX_LINE_BYTES


class CountedCorpus:
    """The documents of some files by row, in the files' order; make one with `count_corpus`.

    Attributes:
        total: how many there are.
        report: what was met while counting, in all processes.
    """

    def __init__(
        self,
        parts: list[Part],
        reading: Reading,
        counts: np.ndarray,
        dropped: np.ndarray,
        report: ReadReport,
        notes: Path,
    ) -> None:
        self._parts, self._reading, self._dropped = parts, reading, Gaps(dropped)
        self._stats = {part.path: _stat(part.path) for part in parts}
        self._firsts = np.concatenate(
            [[0], np.cumsum(counts)]
        )  # the first record of each part, and all records
        self.total = int(self._firsts[-1]) - len(dropped)
        self.report = report
        self._notes, self._next, self._records = notes, 0, self._from(0)

    def read(self, start: int, stop: int) -> Iterator[Document]:
        """Documents ``[start, stop)``, fewer where the corpus ends; cheapest where the last call stopped.

        Raises:
            InputError: a file is no longer what it was when it was counted.
        """
        stop = min(stop, self.total)
        if start >= stop:
            return
        first, last = self._dropped.number_of(np.array([start, stop - 1])).tolist()
        part = self._part_of(first)
        if first < self._next or part > self._part_of(self._next):
            self._next, self._records = int(self._firsts[part]), self._from(part)
        dropped = self._dropped.among(first, last + 1)
        while self._next <= last:
            number, record = self._next, next(self._records)
            self._next += 1
            if number >= first and (dropped is None or not dropped[number - first]):
                yield record.document()

    def forget(self) -> None:
        """Removes what was noted of this corpus."""
        _forget(self._notes)

    def _part_of(self, number: int) -> int:
        return int(np.searchsorted(self._firsts, number, side="right")) - 1

    def _from(self, first: int) -> Iterator[Record]:
        """The records of a part and of all behind it."""
        for part in self._parts[first:]:
            if _stat(part.path) != self._stats[part.path]:
                raise InputError(f"{part.path}: changed since it was counted")
            yield from _records(part, self._reading, ReadReport())


def count_corpus(paths: Sequence[PathLike], notes: PathLike, reading: Reading) -> CountedCorpus:
    """Counts the documents of some files. In a `processes.session` each process counts its share.

    Ids of plain text are the numbers of its lines, counted on from file to file.

    Args:
        paths: files, data sets of the hub, or folders: the files in there whose names say that they hold records, by
            name; of a data set in BEIR's layout the corpus alone.
        notes: a folder for what was counted, which a later call with the same files goes on with; all processes see it.
        reading: see `read_corpus`, whose rules hold.

    Raises:
        InputError: a file or a record breaks a rule; an id has two contents; there is no document.
    """
    files = _files(paths)
    parts = _numbered([part for path in files for part in _parts(path, reading.format)], reading)
    key = _key(files, reading)
    if len(set(processes.gather(key))) > 1:
        raise InputError(f"{', '.join(files)}: the processes see different contents")
    folder = Path(notes) / key
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _counted(files, parts, reading, folder)
    except InputError:
        if processes.count() == 1:  # others may still write there
            _forget(folder)
        raise


def _counted(files: list[str], parts: list[Part], reading: Reading, folder: Path) -> CountedCorpus:
    with progress("counting", "part", len(parts)) as bar:
        for number, part in enumerate(parts):
            if processes.mine(number) and not (folder / f"{number:06d}.npy").exists():
                processes.check()
                _count(part, reading, folder / f"{number:06d}.npy")
            bar.update(1)
    processes.gather(None)
    with processes.first_goes_ahead():
        if processes.first() and not (folder / "dropped.npy").exists():
            _save(folder / "dropped.npy", _repeated(folder, parts, reading))
    tables = [np.load(folder / f"{number:06d}.npy", mmap_mode="r") for number in range(len(parts))]
    counts = np.array([len(table) - 1 for table in tables], np.int64)
    skipped, replaced = (sum(int(table[0, column]) for table in tables) for column in (0, 1))
    dropped = np.load(folder / "dropped.npy")
    total = int(counts.sum()) - len(dropped)
    if not total:
        raise InputError(f"{', '.join(files)}: holds no document")
    return CountedCorpus(
        parts, reading, counts, dropped, ReadReport(total, skipped, len(dropped), replaced), folder
    )


def forget_counts(notes: PathLike) -> None:
    """Removes all that `count_corpus` noted there."""
    shutil.rmtree(notes, ignore_errors=True)


def _forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another call may count another corpus there
        folder.parent.rmdir()


def _files(paths: Sequence[PathLike]) -> list[str]:
    found = []
    for path in [os.fspath(path) for path in paths]:
        if not os.path.isdir(path):
            found.append(path)
            continue
        names = sorted(
            name
            for name in os.listdir(path)
            if (has_records(name) or is_parquet(name)) and not name.startswith(".")
        )
        if not names:
            raise InputError(f"{path}: has no file whose name says that it holds documents, such as .jsonl")
        for name in _without_queries(path, names):
            if name.lower().endswith(FOREIGN):
                if os.path.splitext(name)[0] in names:  # what was unpacked from it is read
                    continue
                raise InputError(f"{os.path.join(path, name)}: of compressed files only gzip is read")
            found.append(os.path.join(path, name))
    return found


def _without_queries(folder: str, names: list[str]) -> list[str]:
    """The files of records in a folder, of one in BEIR's layout those of the corpus: corpus.jsonl, corpus-2.jsonl."""
    stems = [os.path.splitext(name.removesuffix(".gz"))[0] for name in names]
    is_beir = "corpus" in stems and ("queries" in stems or os.path.isdir(os.path.join(folder, "qrels")))
    return [name for name in names if name.startswith("corpus")] if is_beir else names


def _parts(path: str, format: Format | None) -> list[Part]:
    if is_hub(path):
        total = len(rows_of(path))
        return [Part(path, rows=(n, min(n + PART_ROWS, total))) for n in range(0, total, PART_ROWS)]
    try:
        if is_parquet(path):
            return [Part(path, group=group) for group in range(row_groups(path))]
        if not is_json_lines(path, format):
            return [Part(path)]
        size = os.path.getsize(path)
    except (OSError, ImportError) as error:
        raise InputError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    return [Part(path, (start, min(start + PART_BYTES, size))) for start in range(0, size, PART_BYTES)]


def _numbered(parts: list[Part], reading: Reading) -> list[Part]:
    """The parts, where several are files of plain text these with the lines before them."""
    texts = [
        number
        for number, part in enumerate(parts)
        if part == Part(part.path) and is_plain_text(part.path, reading.format, reading.max_bytes)
    ]
    before = 0
    for number, following in itertools.pairwise(texts):
        lines = read_lines(parts[number].path, errors="replace", keep_blank=True, max_bytes=reading.max_bytes)
        before += sum(1 for _ in lines)
        parts[following] = dataclasses.replace(parts[following], before=before)
    return parts


def _key(files: list[str], reading: Reading) -> str:
    """Changes with the files and how they are read."""
    facts = [str(dataclasses.astuple(reading)), str(PART_BYTES), str(PART_ROWS)]
    facts += [f"{path if is_hub(path) else os.path.abspath(path)} {_stat(path)}" for path in files]
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _stat(path: str) -> object:
    if is_hub(path):
        return rows_of(path).fingerprint
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _records(part: Part, reading: Reading, report: ReadReport) -> Iterator[Record]:
    """The records of a part, all with ids."""
    try:
        if part.group is not None:
            rows = read_row_group(part.path, part.group, DOCUMENT)
            records: Iterator[Record] = (named_record(part.path, line, row) for line, row in rows)
        elif part.rows is not None:
            rows = read_span(part.path, part.rows, DOCUMENT)
            records = (named_record(part.path, line, row) for line, row in rows)
        else:
            records = read_records(
                part.path,
                DOCUMENT,
                "jsonl" if part.span else reading.format,
                reading.errors,
                reading.skip_bad_lines,
                reading.max_bytes,
                report,
                part.span,
            )
        for record in records:
            if record.id is None:
                raise line_error(part.path, record.line, NO_ID)
            if record.numbered and part.before:
                record = dataclasses.replace(record, id=str(part.before + record.line))
            yield record
    except LineError as error:
        if part.group is not None or part.rows is not None:
            group = "" if part.group is None else f"row group {part.group}, "
            raise InputError(f"{part.path}, {group}row {error.line}: {error.message}") from error
        if part.span is None or not part.span[0]:
            raise
        raise line_error(
            part.path, error.line + lines_before(part.path, part.span[0] - 1) + 1, error.message
        ) from error


def _count(part: Part, reading: Reading, output: Path) -> None:
    """Notes of a part, uint64 [records + 1, 2]: lines skipped and bytes replaced; of each record id and content."""
    report, hashes = ReadReport(), [(0, 0)]
    for record in _records(part, reading, report):
        assert record.id is not None
        hashes.append((hash_of(record.id), record.content()))
    hashes[0] = report.skipped, report.replaced
    _save(output, np.array(hashes, np.uint64))


def _save(path: Path, value: np.ndarray) -> None:
    with atomic_write(path) as stream:
        np.save(stream, value)


def _repeated(folder: Path, parts: list[Part], reading: Reading) -> np.ndarray:
    """The records, by their number in the whole corpus, that repeat an earlier one.

    Raises:
        InputError: an id has two contents.
    """
    tables = [np.load(folder / f"{number:06d}.npy", mmap_mode="r")[1:] for number in range(len(parts))]
    firsts = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
    found = []
    for piece in range(_SLICES):
        chosen = [np.flatnonzero(table[:, 0] % np.uint64(_SLICES) == piece) for table in tables]
        hashes = np.concatenate([table[rows] for table, rows in zip(tables, chosen, strict=True)])
        numbers = np.concatenate([rows + first for rows, first in zip(chosen, firsts[:-1], strict=True)])
        order = np.argsort(hashes[:, 0], kind="stable")
        hashes, numbers = hashes[order], numbers[order]
        same = np.flatnonzero(hashes[1:, 0] == hashes[:-1, 0])
        for place in same[hashes[same + 1, 1] != hashes[same, 1]][:1]:
            raise _two_contents(parts, firsts, numbers[place : place + 2].tolist(), reading)
        found.append(numbers[same + 1])
    return np.sort(np.concatenate(found))


def _two_contents(parts: list[Part], firsts: np.ndarray, numbers: list[int], reading: Reading) -> InputError:
    places = []
    for number in numbers:
        part = int(np.searchsorted(firsts, number, side="right")) - 1
        records = _records(parts[part], reading, ReadReport())
        record = next(itertools.islice(records, number - int(firsts[part]), None))
        span = parts[part].span
        line = record.line + (lines_before(parts[part].path, span[0] - 1) + 1 if span and span[0] else 0)
        where = "line" if parts[part].rows is None else "row"
        where = where if parts[part].group is None else f"row group {parts[part].group}, row"
        places.append((parts[part].path, f"{where} {line}", record.id))
    (first, there, _), (second, here, id) = places
    there = there if first == second else f"{first}, {there}"
    return InputError(f"{second}, {here}: id {id!r} is in {there} with different content")
