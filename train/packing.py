"""Several texts in one row: no padding to compute, and the same array shape in nearly every step.

Each text of a row has its own segment number and its own positions from 0, and the decoder lets a token see
its own segment alone, so a text gets the vector that it has when it stands by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sgpt_jax.decoder import merge
from sgpt_jax.pooling import pool_texts

# Where a row ends up shorter than this, it is not worth a program of its own.
_SHORTEST_MAX_ROW = 512
# Tokens that a text has at the least, on the average of a row: rows have room for length / _FEW texts.
_FEW = 6


def row_length(longest: int, max_seq_length: int) -> int:
    """The length of rows where the longest text has `longest` tokens: `max_seq_length` up to 512, then in steps."""
    length = _SHORTEST_MAX_ROW
    while length < longest:
        length *= 2
    return min(length, max_seq_length)


def texts_per_row(length: int) -> int:
    """How many texts a row of `length` tokens can hold at the most."""
    return max(1, length // _FEW)


def round_rows(rows: int, multiple: int) -> int:
    """The number of rows to compute for `rows` filled ones: a multiple of `multiple`, from a coarse grid.

    The grid is about one part in eight, so that batches of similar size share one compiled program.
    """
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 3))
    step = -(-step // multiple) * multiple
    return -(-rows // step) * step


def pack(ids: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Packs texts into few rows: longest first, each into the row with the least room that it fits in.

    Args:
        ids: the texts' token ids, none longer than `length`.
        length: of a row, T.
        pad_id: what stands where no text is.

    Returns:
        The rows, int32 `[R, T]` each: `input_ids`, `segments` (1, 2, ... in a row; 0 is padding) and
        `positions`. And the texts' places, int32 `[n]`: row times `texts_per_row(length)`, plus segment minus
        1.
    """
    slots = texts_per_row(length)
    room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the tokens that still fit
    contents: list[list[int]] = []  # texts by row
    for text in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        size = len(ids[text])
        left = next((left for left in range(size, length + 1) if room[left]), length)
        if room[left]:
            row = room[left].pop()
        else:
            row = len(contents)
            contents.append([])
        contents[row].append(text)
        if len(contents[row]) < slots:
            room[left - size].append(row)
    rows = {
        "input_ids": np.full((len(contents), length), pad_id, np.int32),
        "segments": np.zeros((len(contents), length), np.int32),
        "positions": np.zeros((len(contents), length), np.int32),
    }
    places = np.zeros(len(ids), np.int32)
    for row, texts in enumerate(contents):
        start = 0
        for segment, text in enumerate(texts, 1):
            span = slice(start, start + len(ids[text]))
            rows["input_ids"][row, span] = ids[text]
            rows["segments"][row, span] = segment
            rows["positions"][row, span] = np.arange(len(ids[text]))
            places[text] = row * slots + segment - 1
            start = span.stop
    return rows, places


def pad_rows(rows: dict[str, np.ndarray], count: int, pad_id: int) -> dict[str, np.ndarray]:
    """Adds empty rows up to `count`."""
    missing = count - rows["segments"].shape[0]
    fill = {"input_ids": pad_id}
    return {
        name: np.pad(values, ((0, missing), (0, 0)), constant_values=fill.get(name, 0))
        for name, values in rows.items()
    }


def encode_rows(graphdef: Any, params: Any, rows: dict[str, Array], pooling: str) -> Array:
    """The vectors of all texts in packed rows.

    Args:
        graphdef, params: of the decoder, see `sgpt_jax.decoder.split`.
        rows: int32 `[R, T]` each, as `pack` makes them; for dropout also `dropout_keys`, one typed key a row.
        pooling: see `sgpt_jax.pool`.

    Returns:
        float32 `[R, S, E]`, S being `texts_per_row(T)`; places without a text hold zeros.
    """
    segments = rows["segments"]
    hidden = merge(graphdef, params)(
        rows["input_ids"],
        segments != 0,
        positions=rows["positions"],
        segments=segments,
        dropout_keys=rows.get("dropout_keys"),
    )
    numbers = jnp.arange(1, 1 + texts_per_row(segments.shape[1]))
    return pool_texts(hidden, segments[:, None] == numbers[:, None], pooling)
