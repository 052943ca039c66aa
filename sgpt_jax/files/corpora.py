"""Reading corpora, queries and texts (formats: `tables`; names of fields: `columns`; judgements and runs: `runs`).

BEIR's JSON lines have ``_id``, ``text`` and perhaps ``title``. A TSV file without a header has two columns (id, text)
or three (id, title, text), the same number in every line. The id of a line of plain text is its number (blank lines are
counted, though not read). Without ``format=`` the name decides (``.jsonl``, ``.ndjson``, ``.json``, ``.tsv``, ``.csv``,
``.txt``, each also before ``.gz``), and for any other name the first line.
"""

import array
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import DOCUMENT, DOCUMENT_ID, QUERY, TEXT, Columns, Named
from sgpt_jax.files.lines import (
    MAX_LINE_BYTES,
    PathLike,
    ReadReport,
    display_name,
    fix_surrogates,
    line_error,
)
from sgpt_jax.files.tables import Format, read_table

_NUMBER_BITS = 36
NO_ID = "the record has neither `_id` nor `id`"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: ``text`` is what gets encoded (title, a space, text), ``title`` the title alone.

    ``numbered`` says that its id is no more than its number where it was read.
    """

    id: str
    text: str
    title: str = ""
    numbered: bool = field(default=False, compare=False, repr=False)

    def content(self) -> int:
        """A hash of 64 bits of title and text."""
        return _content(self.title, self.text)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, with the line where it begins; ``numbered`` is as of `Document`."""

    line: int
    id: str | None
    title: str
    text: str
    numbered: bool = False

    def content(self) -> int:
        """A hash of 64 bits of title and text."""
        return _content(self.title, self.text)

    def document(self) -> Document:
        """As it is encoded."""
        assert self.id is not None
        return Document(self.id, join_title(self.title, self.text), self.title, self.numbered)


def read_corpus(
    path: PathLike,
    *,
    format: Format | None = None,
    errors: str = "strict",
    skip_bad_lines: bool = False,
    max_bytes: int = MAX_LINE_BYTES,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Yields the documents of a corpus in file order; memory holds one line (of a JSON array all), and 40 bytes an id.

    A title that is missing, null or blank adds nothing to the text, not even a space. The same id with the same content
    is yielded once.

    Args:
        path: JSONL, a JSON array, TSV, CSV or plain text, gzip or not, or "-" for standard input.
        format: the format; None takes it from the name or the first line (see the module's text).
        errors: "strict", or "replace" for invalid UTF-8.
        skip_bad_lines: skip and count JSONL lines that are no JSON object, instead of raising.
        max_bytes: the longest line or CSV record that is read; a JSON array may have 16 times as many.
        report: counts are added here.

    Raises:
        InputError: the file or a line of it breaks a rule, or it holds no document.
    """
    return _read_documents(path, DOCUMENT, "document", format, errors, skip_bad_lines, max_bytes, report)


def read_queries(
    path: PathLike,
    *,
    format: Format | None = None,
    errors: str = "strict",
    skip_bad_lines: bool = False,
    max_bytes: int = MAX_LINE_BYTES,
    report: ReadReport | None = None,
) -> dict[str, str]:
    """Reads queries as {id: text}, in file order, with the arguments and errors of `read_corpus`."""
    queries = _read_documents(path, QUERY, "query", format, errors, skip_bad_lines, max_bytes, report)
    return {query.id: query.text for query in queries}


def read_texts(
    path: PathLike,
    *,
    format: Format | None = None,
    errors: str = "strict",
    skip_bad_lines: bool = False,
    max_bytes: int = MAX_LINE_BYTES,
    report: ReadReport | None = None,
) -> Iterator[str]:
    """Yields texts to be embedded, one a record, in file order. No id is needed; repeated records stay.

    The formats are those of `read_corpus`, but a file is TSV only when ``format`` or its name says so: a tab in a text
    is nothing special. Arguments and errors are those of `read_corpus`; a file without any text is no error here.
    """
    report = ReadReport() if report is None else report
    for record in read_records(path, TEXT, format, errors, skip_bad_lines, max_bytes, report):
        report.records += 1
        yield join_title(record.title, record.text)


def read_ids(
    path: PathLike,
    *,
    format: Format | None = None,
    errors: str = "strict",
    skip_bad_lines: bool = False,
    max_bytes: int = MAX_LINE_BYTES,
    report: ReadReport | None = None,
) -> Iterator[str]:
    """Yields ids of documents: lines of plain text, or of records their ids; arguments and errors as `read_corpus`."""
    rows = read_table(
        path,
        DOCUMENT_ID,
        format=format,
        errors=errors,
        skip_bad_lines=skip_bad_lines,
        max_bytes=max_bytes,
        report=report,
    )
    for line, row in rows:
        if isinstance(row, str):
            yield row
        elif isinstance(row, dict):
            yield _named_id(path, line, row)
        else:
            yield row[0]


def _read_documents(
    path: PathLike,
    columns: Columns,
    kind: str,
    format: Format | None,
    errors: str,
    skip_bad_lines: bool,
    max_bytes: int,
    report: ReadReport | None,
) -> Iterator[Document]:
    report = ReadReport() if report is None else report
    seen = SeenIds()
    for record in read_records(path, columns, format, errors, skip_bad_lines, max_bytes, report):
        if record.id is None:
            raise line_error(path, record.line, NO_ID)
        first, same = seen.first(record.id, record.content(), record.line)
        if not same:
            raise line_error(path, record.line, f"id {record.id!r} is in line {first} with different content")
        if first == record.line:
            report.records += 1
            yield record.document()
        else:
            report.duplicates += 1
    if not seen:
        raise InputError(f"{display_name(path)}: holds no {kind}")


def join_title(title: str, text: str) -> str:
    """Title and text with one space between them; what is blank adds nothing (BEIR's document text)."""
    if not title or title.isspace():
        return text
    return f"{title} {text}" if text else title


class SeenIds:
    """Where the ids of a corpus came first, and with which content: what a dict from each id's hash to the hash of its
    content and its number would be, for corpora with millions of ids.

    Measured over 2 million ids, hashing included: 38 bytes an id (50 while it grows) and 3.2 us, where a dict takes 138
    bytes and 1.5 us; a set of the ids alone, which could not tell a repeated record from a contradiction, 98 bytes.
    The passages of MS MARCO (8.8 million) so take 0.4 GB in place of 1.3 GB beside a model.
    """

    def __init__(self) -> None:
        self._keys, self._values = (array.array("Q", [0]) * 1024 for _ in range(2))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def first(self, id: str, content: int, number: int) -> tuple[int, bool]:
        """Where an id came first, which is the number given if it is new; and whether with the same content.

        Args:
            id: of a record.
            content: a hash of 64 bits of what it holds; the upper bits are kept.
            number: of its line or in its series.
        """
        content = content >> _NUMBER_BITS << _NUMBER_BITS
        there = self._setdefault(hash_of(id), content | number)
        first = there & ((1 << _NUMBER_BITS) - 1)
        return first, there - first == content

    def _setdefault(self, key: int, value: int) -> int:
        """The value of the key, which is the one given if the key is new."""
        key = key or 1  # 0 marks an empty slot
        keys, mask = self._keys, len(self._keys) - 1
        slot = key & mask
        while there := keys[slot]:
            if there == key:
                return self._values[slot]
            slot = (slot + 1) & mask
        keys[slot], self._values[slot] = key, value
        self._count += 1
        if 3 * self._count > 2 * len(keys):
            self._grow()
        return value

    def _grow(self) -> None:
        entries = zip(self._keys, self._values, strict=True)
        size = 2 * len(self._keys)
        self._keys, self._values = (array.array("Q", [0]) * size for _ in range(2))
        self._count = 0
        for key, value in entries:
            if key:
                self._setdefault(key, value)


def hash_of(text: str) -> int:
    """64 bits of BLAKE2."""
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _content(title: str, text: str) -> int:
    return hash_of(f"{len(title)}:{title}{text}")


def read_records(
    path: PathLike,
    columns: Columns,
    format: Format | None,
    errors: str,
    skip_bad_lines: bool,
    max_bytes: int,
    report: ReadReport,
    span: tuple[int, int] | None = None,
) -> Iterator[Record]:
    """The records of a file, or of the lines of it that begin at some bytes.

    In texts to be embedded, a tab says nothing of the format. Arguments and errors are those of `read_table`.
    """
    rows = read_table(
        path,
        columns,
        format=format,
        tabs="text" if columns is TEXT else "tsv",
        errors=errors,
        skip_bad_lines=skip_bad_lines,
        max_bytes=max_bytes,
        report=report,
        span=span,
    )
    count = 0
    for line, row in rows:
        if isinstance(row, dict):
            yield named_record(path, line, row)
        elif isinstance(row, str):
            yield Record(line, str(line), "", row, numbered=True)
        else:
            count = count or len(row)
            yield _table_record(path, line, row, count)


def named_record(path: PathLike, line: int, row: Named) -> Record:
    """A record of fields that have names.

    Raises:
        InputError: a field has a value that it cannot have.
    """
    try:
        id = _id(row["id"][1]) if "id" in row else None
        title, text = read_text(row)
    except ValueError as error:
        raise line_error(path, line, str(error)) from None
    return Record(line, id, title, text)


def _named_id(path: PathLike, line: int, row: Named) -> str:
    try:
        id = _id(row["id"][1]) if "id" in row else None
    except ValueError as error:
        raise line_error(path, line, str(error)) from None
    if id is None:
        raise line_error(path, line, NO_ID)
    return id


def document(row: Named) -> Document:
    """The document of a record.

    Raises:
        ValueError: a field is missing or not what it should be.
    """
    id = _id(row["id"][1]) if "id" in row else None
    if id is None:
        raise ValueError(NO_ID)
    title, text = read_text(row)
    return Document(id, join_title(title, text), title)


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or not (value is None or isinstance(value, str | int)):
        raise ValueError(f"the id must be a string or an integer, not {value!r}")
    if value is None:
        return None
    id = str(value)
    if fix_surrogates(id) != id:
        raise ValueError(f"the id {id!r} holds half a character (a lone surrogate)")
    if not id:
        raise ValueError("the id is empty")
    return id


def read_text(row: Named) -> tuple[str, str]:
    """Title and text of a record; null is empty.

    Raises:
        ValueError: it has no text, or one of them is no string.
    """
    if "text" not in row:
        raise ValueError("the record has no `text`")
    fields = []
    for name in ("title", "text"):
        key, value = row.get(name, (name, None))
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"`{key}` must be a string, not {value!r:.60}")
        fields.append(fix_surrogates(value or ""))
    return fields[0], fields[1]


def _table_record(path: PathLike, line: int, cells: list[str], count: int) -> Record:
    if count not in (2, 3):
        raise line_error(path, line, f"2 or 3 columns are needed, not {count}")
    if len(cells) != count:
        raise line_error(path, line, f"{count} columns are needed, not {len(cells)}")
    if not cells[0]:
        raise line_error(path, line, "the id is empty")
    return Record(line, cells[0], cells[1] if count == 3 else "", cells[-1])
