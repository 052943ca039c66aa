"""The rows of a training batch: the same array shape in nearly every step, on every process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sgpt_jax.packing.rows import RowBatch, fill_rows, lay_out, round_length, texts_per_row

# Where a row ends up shorter than this, it is not worth a program of its own.
_SHORTEST_MAX_ROW = 512


def row_length(longest: int, max_seq_length: int) -> int:
    """The length of rows where the longest text has `longest` tokens: `max_seq_length` up to 512, then in steps.

    A multiple of 8.
    """
    length = _SHORTEST_MAX_ROW
    while length < longest:
        length *= 2
    return min(length, round_length(max_seq_length))


def round_rows(rows: int, multiple: int) -> int:
    """The number of rows to compute for `rows` filled ones: a multiple of `multiple`, from a coarse grid.

    The grid is about one part in eight, so that batches of similar size share one compiled program.
    """
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 3))
    step = -(-step // multiple) * multiple
    return -(-rows // step) * step


def pack(ids: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Packs texts into few rows of one length.

    Args:
        ids: the texts' token ids, none longer than `length`.
        length: of a row, T.
        pad_id: what stands where no text is.

    Returns:
        The rows, see `sgpt_jax.packing.rows.lay_out`. And the texts' places, int32 `[n]`: row times
        `texts_per_row(length)`, plus segment minus 1.
    """
    rows = tuple(texts for _, texts in fill_rows([len(text) for text in ids], lambda _: length))
    batch = RowBatch(rows, len(rows), length, texts_per_row(length))
    arrays, places = lay_out(ids, batch, pad_id)
    by_text = np.zeros(len(ids), np.int32)
    by_text[list(batch.indices)] = places
    return arrays, by_text


def pad_rows(rows: dict[str, np.ndarray], count: int, pad_id: int) -> dict[str, np.ndarray]:
    """Adds empty rows up to `count`."""
    missing = count - rows["segments"].shape[0]
    fill = {"input_ids": pad_id}
    return {
        name: np.pad(values, ((0, missing), (0, 0)), constant_values=fill.get(name, 0))
        for name, values in rows.items()
    }
