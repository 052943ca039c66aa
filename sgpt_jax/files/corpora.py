"""Reading corpora, queries and texts (judgements and runs: `sgpt_jax.files.runs`; lines: `sgpt_jax.files.lines`).

Three formats hold documents and queries:

* ``jsonl``: one object a line with ``_id`` (or ``id``), ``text`` and perhaps ``title``, as BEIR has it.
* ``tsv``: two columns (id, text) or three (id, title, text), the same number in every line. A first line
  whose cells are all among ``id``, ``_id``, ``title``, ``text`` is a header and gives the order. Quotes are
  plain characters.
* ``text``: one text a line; its id is the line number (blank lines are counted, though not read).

Without ``format=`` the name decides (``.jsonl``, ``.ndjson``, ``.json``, ``.tsv``, ``.txt``, each also
before ``.gz``), and for any other name the first line: ``{`` begins JSONL, a tab means TSV, everything else
is plain text.
"""

import array
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import (
    PathLike,
    ReadReport,
    display_name,
    fix_surrogates,
    line_error,
    parse_json,
    read_lines,
)

Format = Literal["jsonl", "tsv", "text"]

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".txt": "text",
}
_COLUMNS = {"id": "id", "_id": "id", "title": "title", "text": "text"}
_LINE_BITS = 36


@dataclass(frozen=True, slots=True)
class Document:
    """One document: ``text`` is what gets encoded (title, a space, text), ``title`` the title alone."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class _Record:
    line: int
    id: str | None
    title: str
    text: str


def read_corpus(
    path: PathLike,
    *,
    format: Format | None = None,
    errors: str = "strict",
    skip_bad_lines: bool = False,
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Yields the documents of a corpus in file order; memory holds one line, and 24 to 48 bytes an id.

    A title that is missing, null or blank adds nothing to the text, not even a space. The same id with the
    same content is yielded once.

    Args:
        path: JSONL, TSV or plain text, gzip or not, or "-" for standard input.
        format: the format; None takes it from the name or the first line (see the module's text).
        errors: "strict", or "replace" for invalid UTF-8.
        skip_bad_lines: skip and count JSONL lines that are no JSON object, instead of raising.
        report: counts are added here.

    Raises:
        InputError: the file or a line of it breaks a rule, or it holds no document.
    """
    return _read_documents(path, "document", format, errors, skip_bad_lines, report)


def read_queries(
    path: PathLike,
    *,
    format: Format | None = None,
    errors: str = "strict",
    skip_bad_lines: bool = False,
    report: ReadReport | None = None,
) -> dict[str, str]:
    """Reads queries as {id: text}, in file order, with the arguments and errors of `read_corpus`."""
    queries = _read_documents(path, "query", format, errors, skip_bad_lines, report)
    return {query.id: query.text for query in queries}


def read_texts(
    path: PathLike,
    *,
    format: Format | None = None,
    errors: str = "strict",
    skip_bad_lines: bool = False,
    report: ReadReport | None = None,
) -> Iterator[str]:
    """Yields texts to be embedded, one a record, in file order. No id is needed; repeated records stay.

    The formats are those of `read_corpus`, but a file is TSV only when ``format`` or its name says so: a
    tab in a text is nothing special. Arguments and errors are those of `read_corpus`; a file without any
    text is no error here.
    """
    report = ReadReport() if report is None else report
    for record in _read_records(path, format, "text", errors, skip_bad_lines, report):
        report.records += 1
        yield _join(record.title, record.text)


def _read_documents(
    path: PathLike,
    kind: str,
    format: Format | None,
    errors: str,
    skip_bad_lines: bool,
    report: ReadReport | None,
) -> Iterator[Document]:
    report = ReadReport() if report is None else report
    seen = _Seen()
    for record in _read_records(path, format, "tsv", errors, skip_bad_lines, report):
        if record.id is None:
            raise line_error(path, record.line, "the record has neither `_id` nor `id`")
        if _is_new(path, record, record.id, seen):
            report.records += 1
            yield Document(record.id, _join(record.title, record.text), record.title)
        else:
            report.duplicates += 1
    if not seen:
        raise InputError(f"{display_name(path)}: holds no {kind}")


def _join(title: str, text: str) -> str:
    """Title and text with one space between them; what is blank adds nothing (BEIR's document text)."""
    if not title or title.isspace():
        return text
    return f"{title} {text}" if text else title


def _is_new(path: PathLike, record: _Record, id: str, seen: "_Seen") -> bool:
    """Whether the id is new. ``seen`` has the hash of the content and the line of each id, by the id's hash."""
    content = _hash(f"{len(record.title)}:{record.title}{record.text}") >> _LINE_BITS << _LINE_BITS
    first = seen.setdefault(_hash(id), content | record.line)
    first_line = first & ((1 << _LINE_BITS) - 1)
    if first - first_line != content:
        raise line_error(path, record.line, f"id {id!r} is in line {first_line} with different content")
    return first_line == record.line


class _Seen:
    """What a dict from integers to integers of 64 bits would be, in 24 to 48 bytes an entry, a fifth of a dict's: the
    corpora that are read have millions of ids."""

    def __init__(self) -> None:
        self._keys, self._values = (array.array("Q", bytes(8 << 10)) for _ in range(2))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def setdefault(self, key: int, value: int) -> int:
        """The value of the key, which is the one given if the key is new."""
        key = key or 1  # 0 is an empty place
        keys, mask = self._keys, len(self._keys) - 1
        place = key & mask
        while there := keys[place]:
            if there == key:
                return self._values[place]
            place = (place + 1) & mask
        keys[place], self._values[place] = key, value
        self._count += 1
        if 3 * self._count > 2 * len(keys):
            self._grow()
        return value

    def _grow(self) -> None:
        entries = zip(self._keys, self._values, strict=True)
        size = 2 * len(self._keys)
        self._keys, self._values = (array.array("Q", bytes(8 * size)) for _ in range(2))
        self._count = 0
        for key, value in entries:
            if key:
                self.setdefault(key, value)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _read_records(
    path: PathLike,
    format: Format | None,
    tabs: Format,
    errors: str,
    skip_bad_lines: bool,
    report: ReadReport,
) -> Iterator[_Record]:
    """The records of a file; ``tabs`` is what a tab in the first line of a file of unknown format means."""
    lines = read_lines(path, errors=errors, report=report)
    if format is None:
        stem = os.fspath(path).lower().removesuffix(".gz")
        format = _SUFFIXES.get(os.path.splitext(stem)[1])
    if format is None:
        first = next(lines, None)
        if first is None:
            return
        lines = itertools.chain([first], lines)
        format = "jsonl" if first[1].lstrip().startswith("{") else tabs if "\t" in first[1] else "text"
    if format == "jsonl":
        yield from _parse_jsonl(path, lines, skip_bad_lines, report)
    elif format == "tsv":
        yield from _parse_tsv(path, lines)
    else:
        for line, text in lines:
            yield _Record(line, str(line), "", text)


def _parse_jsonl(
    path: PathLike, lines: Iterator[tuple[int, str]], skip_bad_lines: bool, report: ReadReport
) -> Iterator[_Record]:
    for line, raw in lines:
        try:
            value = parse_json(raw)
            problem = None if isinstance(value, dict) else f"a JSON object is needed, not {raw[:40]!r}"
        except ValueError as error:
            problem = f"broken JSON: {error}"
        if problem is None:
            yield _json_record(path, line, value)
        elif skip_bad_lines:
            report.skipped += 1
        else:
            raise line_error(path, line, problem)


def _json_record(path: PathLike, line: int, value: dict) -> _Record:
    raw_id = value.get("_id") if value.get("_id") is not None else value.get("id")
    if isinstance(raw_id, bool) or not (raw_id is None or isinstance(raw_id, str | int)):
        raise line_error(path, line, f"the id must be a string or an integer, not {raw_id!r}")
    id = None if raw_id is None else str(raw_id)
    if id is not None:
        if fix_surrogates(id) != id:
            raise line_error(path, line, f"the id {id!r} holds half a character (a lone surrogate)")
        if not id:
            raise line_error(path, line, "the id is empty")
    if "text" not in value:
        raise line_error(path, line, "the record has no `text`")
    fields = []
    for name in ("title", "text"):
        field = value.get(name)
        if not (field is None or isinstance(field, str)):
            raise line_error(path, line, f"`{name}` must be a string, not {field!r:.60}")
        fields.append(fix_surrogates(field or ""))
    return _Record(line, id, *fields)


def _parse_tsv(path: PathLike, lines: Iterator[tuple[int, str]]) -> Iterator[_Record]:
    order: list[str] | None = None
    for line, raw in lines:
        cells = raw.split("\t")
        if order is None:
            names = [_COLUMNS.get(cell.strip().lower()) for cell in cells]
            if None not in names and len(set(names)) == len(names) and {"id", "text"} <= set(names):
                order = [name for name in names if name]
                continue
            order = ["id", "text"] if len(cells) == 2 else ["id", "title", "text"]
            if len(cells) not in (2, 3):
                raise line_error(path, line, f"2 or 3 columns are needed, not {len(cells)}")
        if len(cells) != len(order):
            raise line_error(path, line, f"{len(order)} columns are needed, not {len(cells)}")
        fields = dict(zip(order, cells, strict=True))
        if not fields["id"]:
            raise line_error(path, line, "the id is empty")
        yield _Record(line, fields["id"], fields.get("title", ""), fields["text"])
