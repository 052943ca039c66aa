"""The lowest layer of reading and writing: lines, gzip, encodings, JSON, and files that appear whole.

Paths are anything that ``etils.epath`` takes, so ``gs://`` works where ``gcsfs`` is installed. Readers take ``"-"`` for
standard input.
"""

import contextlib
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from etils import epath

from sgpt_jax.errors import InputError

PathLike = str | os.PathLike[str]

_GZIP_MAGIC = b"\x1f\x8b"
_FOREIGN_MAGIC = re.compile(
    rb"(?P<bzip2>BZh[1-9]1AY&SY)|(?P<xz>\xfd7zXZ\x00)|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<zip>PK\x03\x04)"
)
_BOM = b"\xef\xbb\xbf"
# No text is as long; a file without line ends would fill the memory. Compressed data are read in a stream up to here.
MAX_LINE_BYTES = 1 << 26

_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Not strict: a raw carriage return or tab inside a JSON string is text, since LF alone ends a record.
_DECODER = json.JSONDecoder(strict=False)


@dataclass
class ReadReport:
    """What a reader met and dealt with. Passed to several readers it adds up; print it to tell the user."""

    records: int = 0  # handed out
    skipped: int = 0  # lines that were no JSON object (skip_bad_lines)
    duplicates: int = 0  # records seen before with the same content, kept once
    replaced: int = 0  # invalid UTF-8 sequences that became U+FFFD (errors="replace")

    def __str__(self) -> str:
        notes = [
            f"{count} {what}"
            for count, what in (
                (self.skipped, "bad lines skipped"),
                (self.duplicates, "duplicates dropped"),
                (self.replaced, "invalid byte sequences replaced"),
            )
            if count
        ]
        return ", ".join([f"{self.records} records", *notes])


def display_name(path: PathLike) -> str:
    """How messages name an input path."""
    return "standard input" if os.fspath(path) == "-" else os.fspath(path)


class LineError(InputError):
    """What is wrong with a line (counted from 1) of a file."""

    def __init__(self, path: PathLike, line: int, message: str) -> None:
        super().__init__(f"{display_name(path)}, line {line}: {message}")
        self.path, self.line, self.message = path, line, message


def line_error(path: PathLike, line: int, message: str) -> InputError:
    """The error for a line (counted from 1) of a file, ready to be raised."""
    return LineError(path, line, message)


def lines_before(path: PathLike, position: int) -> int:
    """How many lines end before a byte of a file."""
    count = 0
    with epath.Path(path).open("rb") as stream:
        while position > 0 and (part := stream.read(min(position, 1 << 20))):
            count += part.count(b"\n")
            position -= len(part)
    return count


def fix_surrogates(text: str) -> str:
    """Joins surrogate halves that stand side by side into their character; a lone half becomes U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    joined = _SURROGATE_PAIR.sub(
        lambda pair: pair.group().encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text
    )
    return _SURROGATE.sub("\ufffd", joined)


def read_lines(
    path: PathLike,
    *,
    errors: str = "strict",
    report: ReadReport | None = None,
    keep_blank: bool = False,
    max_bytes: int = MAX_LINE_BYTES,
    span: tuple[int, int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) for every line that is not blank, in constant memory.

    LF alone ends a line; one CR before it, and a byte order mark at the start of the file, are dropped.
    Gzip is told by its magic bytes, whatever the name.

    Args:
        path: the file, or "-" for standard input.
        errors: "strict" or "replace" (invalid UTF-8 becomes U+FFFD, counted in ``report.replaced``).
        report: counts are added here.
        keep_blank: yield blank lines, too.
        max_bytes: the longest line that is read, without its end.
        span: only the lines that begin at these bytes ``[first, last)`` of a file that is not compressed; they are
            counted from the first of them.

    Raises:
        InputError: the file cannot be opened, its gzip data are damaged or cut short, it holds invalid UTF-8, or a
            line is too long.
    """
    report = ReadReport() if report is None else report
    number = 0
    with _open_input(path) as stream:
        left, at_start = None, True  # bytes of the span from here on
        if span is not None:
            at_start = span[0] == 0
            stream.seek(max(0, span[0] - 1))
            left = span[1] - span[0]
            if not at_start:  # what began before
                left -= len(stream.readline()) - 1

        def next_line() -> bytes:
            nonlocal left
            if left is not None and left <= 0:
                return b""
            raw = stream.readline(max_bytes + 2)  # two bytes more are room for its end
            left = None if left is None else left - len(raw)
            return raw

        try:
            for number, raw in enumerate(iter(next_line, b""), 1):
                if len(raw.removesuffix(b"\n").removesuffix(b"\r")) > max_bytes:
                    raise line_error(path, number, f"longer than {max_bytes:,} bytes, the most that is read")
                bom = len(_BOM) if at_start and number == 1 and raw.startswith(_BOM) else 0
                line = raw[bom:].removesuffix(b"\n").removesuffix(b"\r")
                if not keep_blank and (not line or line.isspace()):
                    continue
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    if errors != "replace":
                        where = f"byte {bom + error.start + 1} of the line (0x{line[error.start]:02x})"
                        raise line_error(path, number, f"invalid UTF-8 at {where}") from None
                    text = line.decode("utf-8", "replace")
                    report.replaced += text.count("\ufffd") - line.count(b"\xef\xbf\xbd")
                yield number, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise line_error(path, number + 1, f"damaged or truncated gzip data: {error}") from error
        except OSError as error:
            raise line_error(path, number + 1, f"cannot be read: {error.strerror or error}") from error


def parse_json(text: str) -> Any:
    """Parses one JSON value; control characters inside strings are allowed.

    Raises:
        ValueError: not JSON (this includes nesting too deep and integers too long for Python).
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """Yields a binary stream whose content appears at ``path`` in one step when the block ends well.

    Until then it lies under a temporary name in the same folder, which an exception removes. What is there already and
    is no regular file (a pipe, a terminal) is written to directly.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    target = epath.Path(path)
    name = os.fspath(target)
    local = "://" not in name
    direct = local and os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name)
    if local and not direct:
        target = epath.Path(os.path.realpath(name))  # a symbolic link stays and its target is replaced
    partial = target if direct else target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "is a folder")
        stream = cast(BinaryIO, partial.open("wb"))
    except (OSError, ImportError) as error:
        raise _open_error(path, error) from error
    try:
        with stream:
            yield stream
            stream.flush()
            if local and not direct:
                os.fsync(stream.fileno())
        if not direct:
            partial.replace(target)
    except BaseException:
        if not direct:
            partial.unlink(missing_ok=True)
        raise


def check_no_input(output: PathLike, *inputs: PathLike | None) -> None:
    """Raises InputError when an output is one of the inputs, which it would replace."""
    for path in inputs:
        if path is None or not (os.path.isfile(path) or "://" in os.fspath(path)):
            continue  # a terminal can be both
        if os.path.realpath(path) == os.path.realpath(output):
            raise InputError(f"{output}: is also an input, which the output would replace")


def write_json(path: PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Writes ``value`` as JSON, atomically. NumPy values are converted; NaN and infinities become null."""
    with atomic_write(path) as stream:
        stream.write(dump_json(value, indent) + b"\n")


def write_jsonl(path: PathLike, records: Iterable[Any]) -> None:
    """Writes one JSON value a line, atomically, in constant memory, with the conversions of `write_json`."""
    with atomic_write(path) as stream:
        for record in records:
            stream.write(dump_json(record, None) + b"\n")


def dump_json(value: Any, indent: int | None) -> bytes:
    """The bytes that `write_json` writes, without the final newline."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return fix_surrogates(text).encode("utf-8")


def _plain(value: Any) -> Any:
    """The same value in the types that JSON has."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _open_error(path: PathLike, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{display_name(path)}: cannot be opened: {reason}")


@contextlib.contextmanager
def _open_input(path: PathLike) -> Iterator[io.BufferedIOBase]:
    """The decompressed bytes of a file or of standard input."""
    with contextlib.ExitStack() as stack:
        if os.fspath(path) == "-":
            raw: Any = sys.stdin.buffer
        else:
            try:
                raw = stack.enter_context(epath.Path(path).open("rb"))
            except (OSError, ImportError) as error:
                raise _open_error(path, error) from error
        # peek, because standard input and remote files cannot always seek
        buffered = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
        head = buffered.peek(16)
        if foreign := _FOREIGN_MAGIC.match(head):
            raise InputError(
                f"{display_name(path)}: is compressed with {foreign.lastgroup}; only gzip is read"
            )
        if head[:2] == _GZIP_MAGIC:
            buffered = stack.enter_context(gzip.GzipFile(fileobj=buffered))
        yield buffered
