"""Tables of the Hugging Face hub (package `datasets`) and Parquet files, row by row or by number.

A source of the hub is ``hf:PATH``, ``hf:PATH:SPLIT`` or ``hf:PATH:CONFIG:SPLIT``. PATH is a data set of the hub
(``org/name``), a folder that `datasets` reads as it would a repository (Parquet, JSON or CSV files, named by the
README.md or by the names of splits), or a folder of its `save_to_disk`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import Columns, Named
from sgpt_jax.files.lines import PathLike, line_error
from sgpt_jax.files.parquet import is_parquet, open_parquet

_PREFIX = "hf:"
# Rows that are turned into Python objects at a time.
_ROWS = 1024


def is_hub(source: PathLike) -> bool:
    """Whether a source is one of the hub."""
    return os.fspath(source).startswith(_PREFIX)


def is_table(source: PathLike) -> bool:
    """Whether `read_rows` reads it: a source of the hub, or a name that ends in .parquet."""
    return is_hub(source) or is_parquet(source)


def read_rows(source: PathLike, split: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, row) in order. A data set of the hub is streamed: nothing is kept on disk.

    Raises:
        InputError: it cannot be had, the package that reads it is not installed, or the split is not there.
    """
    if is_hub(source):
        rows: Iterator[dict[str, Any]] = iter(_load(source, split, streaming=True))
    else:
        rows = _parquet_rows(source)
    number = 0
    while True:
        try:
            row = next(rows, None)
        except InputError:
            raise
        except Exception as error:  # the layers below raise what they like
            raise _failed(source, error) from error
        if row is None:
            return
        number += 1
        yield number, row


class Rows(Sequence[dict[str, Any]]):
    """The rows of a data set of the hub by number, memory-mapped from where `datasets` keeps it.

    Args:
        source: of the hub.
        split: which split; None takes that of the source, the only one, or "train".

    Raises:
        InputError: see `read_rows`.
    """

    def __init__(self, source: PathLike, split: str | None = None) -> None:
        self._table = _load(source, split, streaming=False)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: Any) -> Any:
        return self._table[number]

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._table.column_names)

    def select(self, columns: list[str]) -> Any:
        """The same rows with some of the columns."""
        return self._table.select_columns(columns)

    @property
    def fingerprint(self) -> str:
        """Changes with the rows, as `datasets` knows them."""
        return f"{len(self)} {self.columns} {self._table._fingerprint}"

    def lengths(self, column: str) -> list[int] | None:
        """How many values each row's list in a column has; None where the column holds no lists."""
        import pyarrow as pa
        import pyarrow.compute as pc

        values = self._table.with_format("arrow")[column]
        chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
        if not chunks or (
            not pa.types.is_list(chunks[0].type) and not pa.types.is_large_list(chunks[0].type)
        ):
            return None
        return [length or 0 for chunk in chunks for length in pc.list_value_length(chunk).to_pylist()]


@functools.cache
def rows_of(source: str) -> Rows:
    """The rows of a data set of the hub, as they are when this process asks for them first."""
    return Rows(source)


def read_span(source: str, span: tuple[int, int], columns: Columns) -> Iterator[tuple[int, Named]]:
    """The records of some rows, ``[start, stop)``, with their numbers from 1; no other row or column is read.

    Raises:
        InputError: see `read_rows`; or a column looks like one that is read, but is not.
    """
    rows = rows_of(source)
    known = {key for keys in columns.spellings.values() for key in keys}
    try:
        columns.of_object(dict.fromkeys(rows.columns))
        table = rows.select([name for name in rows.columns if name in known])
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    for start in range(*span, _ROWS):
        try:
            found = table[start : min(start + _ROWS, span[1])]
        except Exception as error:  # the layers below raise what they like
            raise _failed(source, error) from error
        for row, values in enumerate(zip(*found.values(), strict=True), start + 1):
            try:
                record = columns.of_object(dict(zip(found, values, strict=True)))
            except ValueError as error:
                raise line_error(source, row, str(error)) from error
            yield row, record


def label_names(source: PathLike, column: str, split: str | None = None) -> list[str] | None:
    """What the numbers of a label column mean, if the data set says so."""
    if not is_hub(source):
        return None
    features = _load(source, split, streaming=True).features or {}
    return getattr(features.get(column), "names", None)


def configs(source: PathLike) -> list[str]:
    """The configurations of a data set of the hub.

    Raises:
        InputError: see `read_rows`.
    """
    path, _, _ = _parts(source)
    try:
        return list(_datasets().get_dataset_config_names(path))
    except Exception as error:
        raise _failed(source, error) from error


def _parts(source: PathLike) -> tuple[str, str | None, str | None]:
    """Path, configuration and split of a source."""
    parts = os.fspath(source).removeprefix(_PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise InputError(f"{source}: a data set of the hub is hf:PATH, hf:PATH:SPLIT or hf:PATH:CONFIG:SPLIT")
    split = parts[-1] if len(parts) > 1 else None
    return parts[0], parts[1] if len(parts) == 3 else None, split or None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "data sets of the hub and Parquet files need the package datasets: pip install 'sgpt-jax[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _load(source: PathLike, split: str | None, *, streaming: bool) -> Any:
    """One split of a data set."""
    datasets = _datasets()
    path, config, named = _parts(source)
    if split is not None and named is not None and split != named:
        raise InputError(f"{source}: names its split; leave out the other one, {split}")
    split = named or split
    try:
        if os.path.exists(os.path.join(path, "state.json")):
            return datasets.load_from_disk(path)
        if os.path.exists(os.path.join(path, "dataset_dict.json")):
            found = datasets.load_from_disk(path)
        elif split is not None and "[" in split and not streaming:
            return datasets.load_dataset(path, config, split=split)
        else:
            found = datasets.load_dataset(path, config, streaming=streaming)
    except Exception as error:
        raise _failed(source, error) from error
    chosen = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if chosen not in found:
        raise InputError(f"{source}: has no split {chosen!r} (there are: {', '.join(found)})")
    return found[chosen]


def _failed(source: PathLike, error: Exception) -> InputError:
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return InputError(f"{source}: cannot be read: {type(error).__name__}: {first}")


def _parquet_rows(source: PathLike) -> Iterator[dict[str, Any]]:
    for batch in open_parquet(source).iter_batches(_ROWS):
        yield from batch.to_pylist()
