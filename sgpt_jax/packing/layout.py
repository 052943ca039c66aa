"""Batches of few shapes: their plans, and the arrays of a plan.

XLA compiles a program for every shape, so lengths and numbers of rows are rounded up to coarse grids. Segments mean the
same everywhere: -1 is padding, 0 a prefix that all texts of its row continue, and 1, 2, ... are the row's texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgpt_jax.decoder.batch import Batch
from sgpt_jax.errors import InputError

# Tokens of a batch on an accelerator: enough to keep matmuls large, and to hide the launch of each program. CPU: each
# encoder has a number of its own.
BATCH_TOKENS = 32768

# The length of the shortest row. Row lengths are multiples of it, except those that end at the model's limit.
LENGTH_UNIT = 16


@dataclass(frozen=True, slots=True)
class Row:
    """What is computed in one row of tokens.

    Attributes:
        texts: indices of the texts in segments 1, 2, ...
        length: tokens, rounded up to a length that rows may have.
        prefix: index of the text in segment 0, or None.
    """

    texts: tuple[int, ...]
    length: int
    prefix: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Rows that are computed together.

    Attributes:
        rows: the rows that hold something.
        num_rows: R, the empty rows after these included.
        length: T, tokens of each row.
    """

    rows: tuple[Row, ...]
    num_rows: int
    length: int

    @property
    def texts(self) -> list[int]:
        """The indices of all texts, row by row."""
        return [text for row in self.rows for text in row.texts]

    @property
    def padded_tokens(self) -> int:
        """Tokens that the decoder computes, padding included."""
        return self.num_rows * self.length


def round_up(size: int, unit: int, steps: int = 1) -> int:
    """Rounds up to a grid of multiples of `unit` that has `steps` numbers to each doubling.

    With one step: unit, 2 unit, 4 unit, 8 unit, ...; with two: unit, 2 unit, 3 unit, 4 unit, 6 unit, 8 unit, ...

    Args:
        size: at least 1.
        unit: the smallest number of the grid.
        steps: a power of two.
    """
    units = -(-size // unit)
    step = max(1, (1 << (units - 1).bit_length()) // (2 * steps))
    return -(-units // step) * step * unit


def check_batch(batch_tokens: int, batch_texts: int | None = None) -> None:
    """Raises InputError when a bound of a batch is not positive."""
    for name, size in (("batch_size", batch_texts), ("batch_tokens", batch_tokens)):
        if size is not None and size < 1:
            raise InputError(f"{name} must be positive, not {size}")


def plan_batches(
    rows: Sequence[Row],
    *,
    batch_tokens: int,
    row_multiple: int = 1,
    same_length: bool = False,
    batch_texts: int | None = None,
) -> list[PlannedBatch]:
    """Groups rows into batches, longest first, so that what does not fit in memory shows early.

    Args:
        rows: of few different lengths.
        batch_tokens: padded tokens of a batch at most, unless `row_multiple` rows alone have more.
        row_multiple: the number of rows of every batch is a multiple of this.
        same_length: a shorter row begins the next batch, for rows of very few lengths. Otherwise it is padded, as each
            length would need one more program, for its last batch.
        batch_texts: texts of a batch at most, unless one row alone has more.

    Returns:
        batches as long as their longest row, with as many rows as fit. Where fewer rows are left, their number is
        rounded up to a power of two times `row_multiple`.

    Raises:
        InputError: `batch_texts` or `batch_tokens` is not positive.
    """
    check_batch(batch_tokens, batch_texts)
    ordered = sorted(rows, key=lambda row: -row.length)
    plans = []
    start = 0
    while start < len(ordered):
        length = ordered[start].length
        num_rows = max(1, batch_tokens // (length * row_multiple)) * row_multiple
        taken = tuple(ordered[start : start + num_rows])
        if same_length:
            taken = tuple(row for row in taken if row.length == length)
        if batch_texts is not None:
            texts = itertools.accumulate(len(row.texts) for row in taken)
            taken = taken[: max(1, sum(count <= batch_texts for count in texts))]
        num_rows = min(num_rows, round_up(len(taken), row_multiple))
        plans.append(PlannedBatch(taken, num_rows, length))
        start += len(taken)
    return plans


def lay_out(
    plan: PlannedBatch,
    texts: Sequence[Sequence[int]],
    pad_id: int,
    prefixes: Sequence[Sequence[int]] = (),
) -> Batch:
    """The arrays of a batch, in numpy.

    Args:
        plan: which text is in which row.
        texts: token ids of all texts.
        pad_id: a valid token id for padding.
        prefixes: token ids of all prefixes. Positions of texts go on from the end of their prefix.
    """
    shape = (plan.num_rows, plan.length)
    input_ids = np.full(shape, pad_id, np.int32)
    positions = np.zeros(shape, np.int32)
    segments = np.full(shape, -1, np.int32)
    for number, row in enumerate(plan.rows):
        prefix = () if row.prefix is None else prefixes[row.prefix]
        end = len(prefix)
        input_ids[number, :end] = prefix
        positions[number, :end] = np.arange(end)
        segments[number, :end] = 0
        for segment, text in enumerate(row.texts, 1):
            span = slice(end, end + len(texts[text]))
            input_ids[number, span] = texts[text]
            positions[number, span] = np.arange(len(prefix), len(prefix) + len(texts[text]))
            segments[number, span] = segment
            end = span.stop
    return Batch(input_ids, positions, segments)
