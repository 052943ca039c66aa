"""Several texts in one row: little padding to compute, and few array shapes to compile.

Each text of a row has its own segment number and its own positions from 0, and the decoder lets a token see
its own segment alone, so a text gets the vector that it has when it stands by itself.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sgpt_jax.decoder.model import merge
from sgpt_jax.decoder.pooling import pool_texts
from sgpt_jax.errors import InputError

# Tokens that a text has at the least, on the average of a row, and the most texts that a row has room for: every place
# is computed and fetched, filled or not.
_FEW, _MOST = 6, 64
# So few tokens are not worth programs of their own for how they can be joined.
_NOT_JOINED = 1024
# Texts are not joined into rows shorter or longer than these: attention costs more the longer a row is.
_SHORTEST_JOINED, _LONGEST_JOINED = 64, 1024
# A token of a row this long costs about twice what it costs in a very short one, in a small decoder.
_DOUBLE_COST = 4096


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Texts that run together.

    Attributes:
        texts: the texts of each row, as indices.
        rows: how many rows there are; those beyond `len(texts)` are empty.
        length: tokens of a row.
        slots: how many texts a row has room for.
    """

    texts: tuple[tuple[int, ...], ...]
    rows: int
    length: int
    slots: int

    @property
    def indices(self) -> tuple[int, ...]:
        """All texts, row by row."""
        return tuple(index for texts in self.texts for index in texts)


def texts_per_row(length: int) -> int:
    """How many texts a row of `length` tokens can hold at the most."""
    return min(_MOST, max(1, length // _FEW))


def length_buckets(max_length: int) -> list[int]:
    """The lengths of rows: 16, 32, 64, then each power of two and the step halfway to the next, up to `max_length`.

    The last is `max_length` rounded up to a multiple of 8, as units of accelerators and their attention kernels want.

    Raises InputError when `max_length` is not positive.
    """
    if max_length < 1:
        raise InputError(f"max_length must be positive, not {max_length}")
    last = round_length(max_length)
    buckets = [16, 32]
    power = 64
    while power < last:
        buckets += [power, power + power // 2]
        power *= 2
    return [length for length in buckets if length < last] + [last]


def round_length(length: int) -> int:
    """The next multiple of 8."""
    return -(-length // 8) * 8


def fill_rows(lengths: Sequence[int], row_length: Callable[[int], int]) -> list[tuple[int, tuple[int, ...]]]:
    """Joins texts into rows: the longest text that is left opens a row, and the longest that still fit fill it.

    Args:
        lengths: tokens of every text.
        row_length: how long the row of a text of so many tokens is; grows with it. A row holds at most
            `texts_per_row` texts.

    Returns:
        (tokens of the row, its texts as indices) of each row, longest rows first.

    Raises:
        ValueError: a row is shorter than its text.
    """
    waiting: dict[int, list[int]] = {}
    for index in range(len(lengths) - 1, -1, -1):  # so that equal texts are taken in their order
        waiting.setdefault(lengths[index], []).append(index)
    sizes = sorted(waiting)
    rows = []
    while sizes:
        length = row_length(sizes[-1])
        if length < sizes[-1]:
            raise ValueError(f"a text of {sizes[-1]} tokens has no place in a row of {length}")
        room, most = length, texts_per_row(length)
        row: list[int] = []
        while len(row) < most and (place := bisect.bisect_right(sizes, room)):
            size = sizes[place - 1]
            row.append(waiting[size].pop())
            room -= size
            if not waiting[size]:
                del sizes[place - 1]
        rows.append((length, tuple(row)))
    return rows


def plan_batches(
    lengths: Sequence[int], *, batch_tokens: int, max_length: int, row_multiple: int = 1
) -> list[RowBatch]:
    """Joins texts into rows and rows into batches of few shapes, longest texts first (so that what does not fit in
    memory shows at once).

    Rows have a length of `length_buckets`: that of the longest text's bucket, and at least one that is the same for
    all rows and is chosen for the least work. A batch has at most `batch_tokens` tokens, its rows rounded down to
    `row_multiple`, unless `row_multiple` rows of the longest text alone have more; the last batch of each row length
    may have fewer rows, a power of two times `row_multiple`. The room for texts in a row is a power of four. Very few
    texts are not joined.

    Raises InputError when a length exceeds `max_length`.
    """
    longest = max(lengths, default=1)
    if longest > max_length:
        worst = lengths.index(longest)
        raise InputError(f"text {worst} has {longest} tokens, more than the limit of {max_length}")
    buckets = length_buckets(max_length)

    def bucket(size: int) -> int:
        return buckets[bisect.bisect_left(buckets, size)]

    def plan(least: int) -> list[RowBatch]:
        rows = fill_rows(lengths, lambda size: max(least, bucket(size)))
        return _batches(rows, batch_tokens, row_multiple)

    def cost(batches: list[RowBatch]) -> float:
        return sum(batch.rows * batch.length * (1 + batch.length / _DOUBLE_COST) for batch in batches)

    if sum(lengths) <= _NOT_JOINED:
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        return _batches([(bucket(longest), (index,)) for index in order], batch_tokens, row_multiple)
    common = [
        length
        for length in buckets
        if _SHORTEST_JOINED <= length <= min(_LONGEST_JOINED, batch_tokens // row_multiple)
    ]
    return min((plan(least) for least in common or buckets[:1]), key=cost)


def _batches(rows: list[tuple[int, tuple[int, ...]]], batch_tokens: int, row_multiple: int) -> list[RowBatch]:
    batches = []
    start = 0
    while start < len(rows):
        length = rows[start][0]
        count = max(1, batch_tokens // (length * row_multiple)) * row_multiple
        texts = tuple(row for size, row in rows[start : start + count] if size == length)
        if len(texts) < count:
            groups = -(-len(texts) // row_multiple)
            count = min(count, row_multiple << (groups - 1).bit_length())
        slots = 1
        while slots < max(map(len, texts)):
            slots *= 4
        batches.append(RowBatch(texts, count, length, slots))
        start += len(texts)
    return batches


def lay_out(
    ids: Sequence[Sequence[int]], batch: RowBatch, pad_id: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of a batch.

    Args:
        ids: token ids of all texts.
        batch: which of them, and where.
        pad_id: what stands where no text is.

    Returns:
        The rows, int32 `[R, T]` each: `input_ids`, `segments` (1, 2, ... in a row; 0 is padding) and
        `positions`. And the places of the batch's texts in the order of its rows, int32 `[n]`: row times `slots`,
        plus segment minus 1.
    """
    shape = (batch.rows, batch.length)
    rows = {
        "input_ids": np.full(shape, pad_id, np.int32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    places = []
    for row, texts in enumerate(batch.texts):
        start = 0
        for segment, text in enumerate(texts, 1):
            span = slice(start, start + len(ids[text]))
            rows["input_ids"][row, span] = ids[text]
            rows["segments"][row, span] = segment
            rows["positions"][row, span] = np.arange(len(ids[text]))
            places.append(row * batch.slots + segment - 1)
            start = span.stop
    return rows, np.array(places, np.int32)


def encode_rows(graphdef: Any, params: Any, rows: dict[str, Array], pooling: str, slots: int) -> Array:
    """The vectors of all texts in packed rows.

    Args:
        graphdef, params: of the decoder, see `sgpt_jax.decoder.model.split`.
        rows: int32 `[R, T]` each, as `lay_out` makes them; for dropout also `dropout_keys`, one typed key a row.
        pooling: see `sgpt_jax.pool`.
        slots: S, how many texts a row has room for.

    Returns:
        float32 `[R, S, E]`; places without a text hold zeros.

    Raises:
        ValueError: for an unknown pooling mode.
    """
    segments = rows["segments"]
    hidden = merge(graphdef, params)(
        rows["input_ids"],
        segments != 0,
        positions=rows["positions"],
        segments=segments,
        dropout_keys=rows.get("dropout_keys"),
    )
    numbers = jnp.arange(1, 1 + slots)
    return pool_texts(hidden, segments[:, None] == numbers[:, None], pooling)
