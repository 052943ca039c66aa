"""The few shapes of batches that a server compiles before it is ready, and which of them a batch takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sgpt_jax.packing.layout import PlannedBatch, Row
from sgpt_jax.packing.rows import round_length

# A token of a row this long costs about twice what it costs in a very short one, in a small decoder.
_DOUBLE_COST = 4096
# What a batch costs beside its tokens (reading the weights, launching programs), as a share of the full budget.
_LAUNCH = 1 / 16


@dataclass(frozen=True)
class Shape:
    """A batch of `rows` rows with `length` tokens each."""

    rows: int
    length: int

    @classmethod
    def of(cls, plan: PlannedBatch) -> Shape:
        """The shape of a batch."""
        return cls(plan.num_rows, plan.length)

    def holding(self, rows: Sequence[Row]) -> PlannedBatch:
        """A batch of this shape."""
        return PlannedBatch(tuple(rows), self.rows, self.length)


def row_lengths(longest: int) -> list[int]:
    """Lengths of rows: 32, doubling, and at last `longest` rounded up to a multiple of 8."""
    last, lengths = round_length(longest), [32]
    while lengths[-1] < last:
        lengths.append(lengths[-1] * 2)
    return [length for length in lengths if length < last] + [last]


def shapes(lengths: Sequence[int], budget: int, multiple: int, several: Sequence[int]) -> list[Shape]:
    """All shapes of a server.

    Args:
        lengths: of rows.
        budget: tokens that a batch has at most, if it has more than `multiple` rows.
        multiple: the number of rows is a multiple of it.
        several: those of the lengths for which there are more than `multiple` rows: as many as the budget allows, and
            again a quarter of that.
    """
    found = []
    for length in lengths:
        counts = {multiple}
        most = budget // length if length in several else 0
        while most > multiple:
            counts.add(most // multiple * multiple)
            most //= 4
        found += [Shape(count, length) for count in sorted(counts)]
    return found


def choose(
    sizes: Sequence[int],
    shapes: Sequence[Shape],
    budget: int,
    fill: Callable[[list[int], int], list[Row]],
) -> PlannedBatch:
    """The batch that does the most work for its time; the first item is always in it.

    Args:
        sizes: tokens of the items that wait, in the order of their turns. None exceeds the longest shape.
        shapes: to choose from.
        budget: tokens of a full batch.
        fill: gives the rows of some items, as indices into `sizes`, for a length of rows.
    """
    best: tuple[float, PlannedBatch] | None = None
    for length in sorted({shape.length for shape in shapes if shape.length >= sizes[0]}):
        fitting = [index for index, size in enumerate(sizes) if size <= length]
        rows = sorted(fill(fitting, length), key=lambda row: min(row.texts))
        for shape in shapes:
            if shape.length != length:
                continue
            plan = shape.holding(rows[: shape.rows])
            tokens = sum(sizes[index] for index in plan.texts)
            cost = (shape.rows * length + budget * _LAUNCH) * (1 + length / _DOUBLE_COST)
            if best is None or tokens / cost > best[0]:
                best = tokens / cost, plan
    assert best is not None, "an item is longer than every shape"
    return best[1]
