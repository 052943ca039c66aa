"""Records from JSON lines, JSON arrays, TSV, CSV, plain text, Parquet and data sets of the hub, with their fields under
the names of `columns`.

* ``jsonl``: one object a line. A file that begins with ``[`` and an object is one JSON array of such objects.
* ``tsv``: cells between tabs; quotes are plain characters. The first line may be a header.
* ``csv``: cells between commas, quoted as Excel and Python quote them, with a header.
* ``text``: one text a line.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from etils import epath

from sgpt_jax.files.columns import Columns, Named
from sgpt_jax.files.hub_tables import is_table, read_rows
from sgpt_jax.files.lines import MAX_LINE_BYTES, PathLike, ReadReport, line_error, parse_json, read_lines

Format = Literal["jsonl", "tsv", "csv", "text"]
# A line, and its fields by name; its cells, where no header names them; or a plain text.
Row = tuple[int, Named | list[str] | str]

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".txt": "text",
}
# Compressed in ways that are not read.
FOREIGN = (".bz2", ".xz", ".zst", ".lz4", ".zip")
_BLANKS = " \t\r\x0b\x0c"
_ARRAY = re.compile(r"\s*\[\s*(\{|$)")
_CELL = 1 << 30  # the csv module's own limit, 128 KiB a cell, is too low for documents
_DECODER = json.JSONDecoder(strict=False)

Lines = Iterator[tuple[int, str]]


def read_table(
    path: PathLike,
    columns: Columns,
    *,
    format: Format | None = None,
    by_name: bool = True,
    tabs: Format = "tsv",
    plain: Format = "text",
    errors: str = "strict",
    skip_bad_lines: bool = False,
    max_bytes: int = MAX_LINE_BYTES,
    report: ReadReport | None = None,
    span: tuple[int, int] | None = None,
) -> Iterator[Row]:
    """Yields the records of a file in its order.

    Args:
        path: the file, gzip or not, or "-" for standard input; a Parquet file, or a data set of the hub (see
            `hub_tables`), whose records are objects as those of JSON.
        columns: the fields to read.
        format: None takes it from the name or, where that says nothing, from the first line: `{` begins JSON lines,
            `[{` a JSON array.
        by_name: whether the name counts.
        tabs: what a tab in the first line of a file of unknown format means.
        plain: what any other first line means; a name that ends in .txt says no more than that.
        errors: "strict", or "replace" for invalid UTF-8.
        skip_bad_lines: skip and count JSON lines that are no JSON object, instead of raising.
        max_bytes: the longest line or CSV record that is read; a JSON array, which is read whole, may have 16 times as
            many.
        report: counts of what was skipped and replaced are added here.
        span: bytes of JSON lines: only the lines that begin there, see `read_lines`.

    Raises:
        InputError: the file or a line of it breaks a rule, naming both.
    """
    report = ReadReport() if report is None else report
    if format is None and is_table(path):
        yield from _objects(path, columns, read_rows(path), skip_bad_lines, report)
        return
    lines = read_lines(path, errors=errors, report=report, keep_blank=True, max_bytes=max_bytes, span=span)
    if format is None and by_name:
        named = _named_format(path)
        format = None if named == "text" != plain else named
    first = next((pair for pair in lines if pair[1].strip(_BLANKS)), None)
    if first is None:
        return
    format = format or _format_of(first[1], tabs, plain)
    lines = itertools.chain([first], lines)
    if format == "csv":
        yield from _read_csv(path, columns, lines, max_bytes)
        return
    lines = (pair for pair in lines if pair[1].strip(_BLANKS))
    if format == "jsonl":
        is_array = span is None and _ARRAY.match(first[1])
        values = _array(path, lines, 16 * max_bytes) if is_array else _json_lines(path, lines)
        yield from _objects(path, columns, values, skip_bad_lines, report)
    elif format == "tsv":
        yield from _read_cells(path, columns, ((line, text.split("\t")) for line, text in lines))
    else:
        yield from lines


def is_json_lines(path: PathLike, format: Format | None) -> bool:
    """Whether a file has a JSON object in every line, and is not compressed, by its name and its beginning."""
    suffix = os.path.splitext(os.fspath(path).lower())[1]
    if format not in (None, "jsonl") or (format is None and _SUFFIXES.get(suffix) != "jsonl"):
        return False
    with epath.Path(path).open("rb") as stream:
        head = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"{")


def has_records(name: str) -> bool:
    """Whether a file's name says that records are in it, however it is compressed."""
    stem, suffix = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1] if suffix in (".gz", *FOREIGN) else suffix) in _SUFFIXES


def is_plain_text(path: PathLike, format: Format | None, max_bytes: int = MAX_LINE_BYTES) -> bool:
    """Whether a file that `read_table` would read has a text a line, by its name and its beginning."""
    if format is None and not is_table(path):
        format = _named_format(path)
        if format is None:
            lines = read_lines(path, errors="replace", max_bytes=max_bytes)
            format = _format_of(next(lines, (0, "{"))[1], "tsv", "text")
    return format == "text"


def _named_format(path: PathLike) -> Format | None:
    stem = os.fspath(path).lower().removesuffix(".gz")
    return _SUFFIXES.get(os.path.splitext(stem)[1])


def _format_of(first: str, tabs: Format, plain: Format) -> Format:
    """What the first line that is not blank says."""
    head = first.lstrip()
    is_json = head.startswith("{") or _ARRAY.match(head)
    return "jsonl" if is_json else tabs if "\t" in first else plain


def _json_lines(path: PathLike, lines: Lines) -> Iterator[tuple[int, Any]]:
    """The objects of JSON lines; in the place of a bad line comes a text that says what is wrong with it."""
    for line, text in lines:
        try:
            value = parse_json(text)
            problem = value if isinstance(value, dict) else f"a JSON object is needed, not {text[:40]!r}"
        except ValueError as error:
            problem = f"broken JSON: {error}"
        yield line, problem


def _array(path: PathLike, lines: Lines, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array as `_json_lines` gives lines; the line of each is where it begins."""
    parts: list[str] = []
    left = max_bytes
    for line, text in lines:
        left -= len(text.encode())
        if left < 0:
            raise line_error(
                path,
                line,
                f"the JSON array is longer than {max_bytes:,} bytes, the most that is read; use JSON lines",
            )
        parts.extend([""] * (line - 1 - len(parts)))  # blank lines again, so that lines are the file's
        parts.append(text)
    text = "\n".join(parts)
    space = re.compile(r"\s*")
    position, line, counted = text.index("[") + 1, 1, 0

    def skip(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    while True:
        position = skip(position)
        line += text.count("\n", counted, position)
        counted = position
        if text.startswith("]", position):
            break
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise line_error(path, error.lineno, f"broken JSON: {error.msg}, column {error.colno}") from None
        except (RecursionError, ValueError) as error:
            raise line_error(path, line, f"broken JSON: {error}") from None
        yield line, value if isinstance(value, dict) else f"a JSON object is needed, not {value!r:.40}"
        position = skip(position)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            line += text.count("\n", counted, position)
            raise line_error(path, line, "broken JSON: a comma or the end of the array is needed")
    if text[position + 1 :].strip():
        raise line_error(path, line, "broken JSON: text behind the end of the array")


def _objects(
    path: PathLike,
    columns: Columns,
    values: Iterable[tuple[int, Any]],
    skip_bad_lines: bool,
    report: ReadReport,
) -> Iterator[Row]:
    for line, value in values:
        if isinstance(value, dict):
            try:
                yield line, columns.of_object(value)
            except ValueError as error:
                raise line_error(path, line, str(error)) from None
        elif skip_bad_lines:
            report.skipped += 1
        else:
            raise line_error(path, line, value)


def _read_cells(path: PathLike, columns: Columns, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        return
    try:
        header = columns.of_header(first[1])
    except ValueError as error:
        raise line_error(path, first[0], str(error)) from None
    if header is None:
        yield first
        yield from rows
        return
    for line, cells in rows:
        if len(cells) != len(header):
            raise line_error(path, line, f"{len(header)} columns are needed, not {len(cells)}")
        yield line, columns.of_cells(header, cells)


def _read_csv(path: PathLike, columns: Columns, lines: Lines, max_bytes: int) -> Iterator[Row]:
    rows = _read_cells(path, columns, _csv_rows(path, lines, max_bytes))
    for line, row in rows:
        if columns.header and isinstance(row, list):
            names = " and ".join(f"`{columns.spellings[field][0]}`" for field in columns.needed)
            raise line_error(path, line, f"a CSV file needs a header that names {names}, between commas")
        yield line, row


def _csv_rows(path: PathLike, lines: Lines, max_bytes: int) -> Iterator[tuple[int, list[str]]]:
    """Rows and the lines where they begin; a quoted cell may go over several lines."""
    start = left = 0

    def texts() -> Iterator[str]:
        nonlocal start, left
        for line, text in lines:
            start = start or line
            left -= len(text.encode())
            if left < 0:
                raise line_error(path, start, f"longer than {max_bytes:,} bytes, the most that is read")
            yield text + "\n"

    csv.field_size_limit(_CELL)
    reader = csv.reader(texts(), strict=True)
    while True:
        start, left = 0, max_bytes
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise line_error(path, start, f"broken CSV: {error}") from None
        if cells is None:
            return
        if any(cell.strip(_BLANKS) for cell in cells):
            yield start, cells
