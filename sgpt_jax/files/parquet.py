"""Records of Parquet files, by row groups; needs pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import Columns, Named
from sgpt_jax.files.lines import PathLike, display_name, line_error

_ROWS = 1024  # at a time


def is_parquet(path: PathLike) -> bool:
    """Whether a file is Parquet, by its name."""
    return os.fspath(path).lower().endswith(".parquet")


def row_groups(path: PathLike) -> int:
    """How many row groups a file has.

    Raises:
        InputError: pyarrow is not installed, or the file cannot be read.
    """
    return open_parquet(path).num_row_groups


def read_row_group(path: PathLike, group: int, columns: Columns) -> Iterator[tuple[int, Named]]:
    """The records of a row group with their rows in it, from 1, in memory that does not depend on its size.

    Raises:
        InputError: a column looks like one that is read, but is not; the file is damaged.
    """
    from pyarrow import ArrowException

    file = open_parquet(path)
    names = file.schema_arrow.names
    known = {key for keys in columns.spellings.values() for key in keys}
    row = 0
    try:
        columns.of_object(dict.fromkeys(names))
        wanted = [name for name in names if name in known]
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted):
            for record in batch.to_pylist():
                row += 1
                yield row, columns.of_object(record)
    except ArrowException as error:
        raise line_error(path, row + 1, f"row group {group} cannot be read: {error}") from error
    except ValueError as error:
        raise InputError(f"{display_name(path)}: {error}") from error


def open_parquet(path: PathLike) -> Any:
    """The file, as `pyarrow.parquet.ParquetFile`.

    Raises:
        InputError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f"{display_name(path)}: Parquet needs pyarrow: pip install 'sgpt-jax[datasets]'"
        ) from None
    try:
        return ParquetFile(os.fspath(path), pre_buffer=False)
    except (OSError, ArrowException) as error:
        raise InputError(f"{display_name(path)}: cannot be read: {error}") from error
