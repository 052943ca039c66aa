"""Reading semantic textual similarity: pairs of sentences with a score that people gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import STS
from sgpt_jax.files.lines import PathLike, display_name, fix_surrogates, line_error
from sgpt_jax.files.tables import read_table

Pair = tuple[float, str, str]  # score, first and second sentence

_STS_BENCHMARK = (4, 5, 6)  # the columns of these


def read_sts(path: PathLike) -> list[Pair]:
    """Reads (score, sentence 1, sentence 2), in the file's order.

    The first line tells what the file is, whatever its name:

    * with tabs, as STS-Benchmark is published: genre, file, year, id, score, sentence 1, sentence 2, and perhaps two
      licence columns, under names that end in .csv; or three columns, the score first or last. Quotes are plain
      characters;
    * JSON lines or a JSON array, with sentence1, sentence2 and score; Parquet or a data set of the hub, these two by
      name;
    * else CSV: three columns, the score first or last.

    A header may give the order of any columns.

    Raises:
        InputError: other columns, a line without a finite score, fewer than two pairs, or the same score for all.
    """
    pairs: list[Pair] = []
    order: tuple[int, int, int] | None = None
    for line, row in read_table(path, STS, by_name=False, plain="csv"):
        if isinstance(row, dict):
            if missing := [field for field in STS.needed if field not in row]:
                raise line_error(path, line, f"the record has no `{STS.spellings[missing[0]][0]}`")
            score, first, second = (row[field][1] for field in ("score", "first", "second"))
        else:
            order = order or _order(path, line, row)
            if not (7 <= len(row) <= 9 if order == _STS_BENCHMARK else len(row) == 3):
                needed = "7 to 9" if order == _STS_BENCHMARK else "3"
                raise line_error(path, line, f"{needed} columns are needed, not {len(row)}")
            score, first, second = (row[column] for column in order)
        pairs.append((_score(path, line, score), _text(path, line, first), _text(path, line, second)))
    if len(pairs) < 2:
        raise InputError(f"{display_name(path)}: holds {len(pairs)} pairs; a correlation needs two")
    if len({score for score, _, _ in pairs}) < 2:
        raise InputError(f"{display_name(path)}: all scores are the same: no correlation exists")
    return pairs


def _order(path: PathLike, line: int, cells: Sequence[str]) -> tuple[int, int, int]:
    """Where score and sentences are in lines without a header."""
    if 7 <= len(cells) <= 9:
        return _STS_BENCHMARK
    if len(cells) == 3 and _is_number(cells[0]) != _is_number(cells[2]):
        return (0, 1, 2) if _is_number(cells[0]) else (2, 0, 1)
    raise line_error(
        path,
        line,
        "STS-Benchmark's 7 to 9 columns are needed, 3 with a score first or last, or a header with sentence1, "
        f"sentence2 and score; not {len(cells)} columns without any of these",
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _score(path: PathLike, line: int, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not _is_number(str(value)):
        raise line_error(path, line, f"the score must be a number, not {value!r}")
    return float(value)


def _text(path: PathLike, line: int, value: Any) -> str:
    if not isinstance(value, str):
        raise line_error(path, line, f"a sentence must be a string, not {value!r:.60}")
    return fix_surrogates(value)
