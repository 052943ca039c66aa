"""Opening GGUF files: metadata and tensors as they are stored, also of a file that is split into parts."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sgpt_jax.checkpoint.untrusted import check_content
from sgpt_jax.errors import InputError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An opened GGUF file.

    Attributes:
        metadata: all its fields, by name.
        tensors: its tensors, memory-mapped and as they are stored.
    """

    metadata: dict[str, Any]
    tensors: list[gguf.ReaderTensor]


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """All files of a GGUF file, in their order: NAME-00001-of-00003.gguf and so on; the file alone if it is no part."""
    file = Path(path)
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    stem, _, count, end = match.groups()
    return [file.with_name(f"{stem}-{number:05d}-of-{count}{end}") for number in range(1, int(count) + 1)]


def open_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Opens a GGUF file, of a split one all parts; parsing metadata takes a second, so the last one is kept.

    Raises:
        InputError: no such file, or it is damaged, or parts of it are missing.
    """
    files = parts_of(path)
    if missing := [file.name for file in files if not file.exists()]:
        if len(missing) == len(files):
            raise InputError(f"{path}: no such file")
        raise InputError(f"{path}: parts of this split GGUF file are not there: {', '.join(missing)}")
    for file in files:
        check_content(file)
        _check_byte_order(file)
    try:
        facts = [os.stat(file) for file in files]
        opened = _open_gguf(
            tuple((os.fspath(f), x.st_mtime_ns, x.st_size) for f, x in zip(files, facts, strict=True))
        )
    except Exception as problem:
        raise InputError(f"{path}: damaged GGUF file: {problem}") from None
    stated = opened.metadata.get("split.count") or 1
    if isinstance(stated, int) and stated > 1 and stated != len(files):
        raise InputError(
            f"{path}: one of {stated} parts of a split GGUF file, but its name does not say so; parts are named "
            "NAME-00001-of-00003.gguf and so on"
        )
    return opened


def _check_byte_order(file: Path) -> None:
    """Refuses a big-endian file, whose quantised blocks the gguf package would decode to other numbers.

    Raises:
        InputError: it is one.
    """
    with open(file, "rb") as stream:
        start = stream.read(8)
    # The version, a small number, is behind the magic.
    if start[:6] == b"GGUF\0\0" and any(start[6:]):
        raise InputError(
            f"{file}: a big-endian GGUF file, which is not supported; convert it to little-endian"
        )


@functools.lru_cache(maxsize=1)
def _open_gguf(files: tuple[tuple[str, int, int], ...]) -> Gguf:
    readers = [_Reader(path) for path, _, _ in files]
    metadata = {name: _contents(field) for name, field in readers[0].fields.items()}
    return Gguf(metadata, [tensor for reader in readers for tensor in reader.tensors])


class _Reader(gguf.GGUFReader):
    """Reads lists at once: gguf keeps an array or two for every entry of a vocabulary, up to 1.5 kB together."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            return 12 + values.nbytes, [values.tolist()], [], [raw_type, kind]
        if kind != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        length = struct.Struct("<Q")
        data = self.data.data
        strings = []
        for _ in range(count):
            end = start + 8 + length.unpack_from(data, start)[0]
            strings.append(str(data[start + 8 : end], "utf-8"))
            start = end
        return start - orig_offs, [strings], [], [raw_type, kind]


def _contents(field: gguf.ReaderField) -> Any:
    last: Any = field.parts[-1]
    return last if isinstance(last, list) else field.contents()
