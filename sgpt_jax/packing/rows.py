"""Several texts in one row, for vectors: little padding to compute, and few shapes to compile.

Each text of a row has a segment of its own and positions from 0, and the decoder lets a token see its own segment
alone. So a text gets the vector that it would get in a row of its own.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.batch import Batch
from sgpt_jax.decoder.model import merge
from sgpt_jax.decoder.modules import Modules, apply_modules
from sgpt_jax.decoder.pooling import normalize as l2_normalize
from sgpt_jax.decoder.pooling import pool_texts
from sgpt_jax.decoder.program import DecoderProgram
from sgpt_jax.decoder.sharding import on_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import LENGTH_UNIT, PlannedBatch, Row, check_batch, plan_batches, round_up

# A row has room for one text for every 6 tokens, and for 64 at most: a vector is pooled and fetched for every text that
# there is room for, whether it is there or not.
_TOKENS_PER_TEXT, _MOST_TEXTS = 6, 64
# Texts of this many tokens in all, or fewer, get a row each: joining them would compile more programs for little work.
_NOT_JOINED = 1024
# `shortest_row` chooses a minimum length of rows between these: attention costs more the longer a row is.
_SHORTEST_JOINED, _LONGEST_JOINED = 64, 1024
# A token of a row this long costs about twice what it costs in a very short one, in a small decoder.
_DOUBLE_COST = 4096


def most_texts(length: int) -> int:
    """How many texts a row of `length` tokens can hold at the most."""
    return min(_MOST_TEXTS, max(1, length // _TOKENS_PER_TEXT))


def texts_per_row(plan: PlannedBatch) -> int:
    """S, how many texts each row of a batch has room for: a power of four, so that few programs are compiled."""
    room = 1
    while room < max(len(row.texts) for row in plan.rows):
        room *= 4
    return room


def round_length(length: int) -> int:
    """Rounds up to a multiple of 8, as accelerators and their attention kernels want it."""
    return -(-length // 8) * 8


def length_buckets(max_length: int) -> list[int]:
    """The lengths of rows: 16, 32, 48, 64, then two to each doubling; the last is `max_length`, rounded to 8.

    Two are enough, as shorter texts fill what a row's longest text leaves.

    Raises:
        InputError: when `max_length` is not positive.
    """
    if max_length < 1:
        raise InputError(f"max_length must be positive, not {max_length}")
    last = round_length(max_length)
    buckets = [0]
    while buckets[-1] < last:
        buckets.append(min(last, round_up(buckets[-1] + 1, LENGTH_UNIT, steps=2)))
    return buckets[1:]


def fill_rows(
    lengths: Sequence[int], row_length: Callable[[int], int], row_texts: int = _MOST_TEXTS
) -> list[Row]:
    """Joins texts into rows: the longest text that is left opens a row, and the longest that still fit fill it.

    Args:
        lengths: tokens of every text.
        row_length: length of the row that a text of so many tokens opens, not falling with it.
        row_texts: texts of a row at the most.

    Returns:
        the rows, longest first, of at most `most_texts` texts each.

    Raises:
        ValueError: a row would be shorter than the text that opens it.
    """
    waiting: dict[int, list[int]] = {}
    for index in range(len(lengths) - 1, -1, -1):  # so that equal texts are taken in their order
        waiting.setdefault(lengths[index], []).append(index)
    sizes = sorted(waiting)
    rows = []
    while sizes:
        length = row_length(sizes[-1])
        if length < sizes[-1]:
            raise ValueError(f"a text of {sizes[-1]} tokens does not fit in a row of {length}")
        left, most = length, min(row_texts, most_texts(length))
        texts: list[int] = []
        while len(texts) < most and (fitting := bisect.bisect_right(sizes, left)):
            size = sizes[fitting - 1]
            texts.append(waiting[size].pop())
            left -= size
            if not waiting[size]:
                del sizes[fitting - 1]
        rows.append(Row(tuple(texts), length))
    return rows


@dataclasses.dataclass(frozen=True)
class Packing:
    """How texts are joined into batches.

    Attributes:
        batch_tokens, row_multiple, batch_texts: see `plan_batches`.
        max_length: tokens of a text at the most.

    Raises:
        InputError: `batch_texts` or `batch_tokens` is not positive.
    """

    batch_tokens: int
    max_length: int
    row_multiple: int = 1
    batch_texts: int | None = None

    def __post_init__(self) -> None:
        check_batch(self.batch_tokens, self.batch_texts)

    def batches(self, rows: list[Row]) -> list[PlannedBatch]:
        """Batches of these rows, each of rows of one length."""
        return plan_batches(
            rows,
            batch_tokens=self.batch_tokens,
            row_multiple=self.row_multiple,
            same_length=True,
            batch_texts=self.batch_texts,
        )

    def joined(self, lengths: Sequence[int], least: int) -> list[PlannedBatch]:
        """Batches of texts of these lengths, in rows of `least` tokens or more."""
        buckets = length_buckets(self.max_length)

        def row_length(size: int) -> int:
            return max(least, buckets[bisect.bisect_left(buckets, size)])

        return self.batches(fill_rows(lengths, row_length, self.batch_texts or _MOST_TEXTS))


def shortest_row(lengths: Sequence[int], packing: Packing, times: int = 1) -> int:
    """The minimum length of rows with which the batches of texts cost least.

    Args:
        lengths: tokens of every text.
        packing: how they are joined.
        times: there are so many times as many texts of such lengths in all, and as few batches that are not full.
    """

    def cost(least: int) -> float:
        return sum(
            ((times - 1) * len(batch.rows) + batch.num_rows)
            * batch.length
            * (1 + batch.length / _DOUBLE_COST)
            for batch in packing.joined(lengths, least)
        )

    buckets = length_buckets(packing.max_length)
    most = min(_LONGEST_JOINED, packing.batch_tokens // packing.row_multiple)
    return min([size for size in buckets if _SHORTEST_JOINED <= size <= most] or buckets[:1], key=cost)


def plan_texts(lengths: Sequence[int], packing: Packing, least: int | None = None) -> list[PlannedBatch]:
    """Joins texts into rows, and rows into batches, see `plan_batches`.

    A row is as long as the bucket of its longest text (`length_buckets`), but not shorter than a minimum for all rows.

    Args:
        lengths: tokens of every text.
        packing: how.
        least: the minimum; None chooses the one for which the batches cost least, and gives texts of few tokens in all
            a row each, all rows of one length.

    Raises:
        InputError: a length exceeds the packing's.
    """
    longest = max(lengths, default=1)
    if longest > packing.max_length:
        worst = lengths.index(longest)
        raise InputError(f"text {worst} has {longest} tokens, more than the limit of {packing.max_length}")
    if least is None and sum(lengths) <= _NOT_JOINED:
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        buckets = length_buckets(packing.max_length)
        length = buckets[bisect.bisect_left(buckets, longest)]
        return packing.batches([Row((index,), length) for index in order])
    return packing.joined(lengths, shortest_row(lengths, packing) if least is None else least)


def vector_indices(plan: PlannedBatch, room: int) -> np.ndarray:
    """Indices of the vectors of a batch's texts in the result of `encode_rows`, reshaped to [R * S, E].

    Args:
        plan: of the batch.
        room: S.

    Returns:
        int32 [n], in the order of `plan.texts`.
    """
    indices = [
        number * room + column for number, row in enumerate(plan.rows) for column in range(len(row.texts))
    ]
    return np.array(indices, np.int32)


def rows_apart(plan: PlannedBatch, vectors: np.ndarray) -> Iterator[PlannedBatch]:
    """Batches of the same shape in which the texts of a batch whose vectors are not finite have a row each.

    A text whose hidden states are NaN makes those of its row NaN, as 0 times NaN is NaN.

    Args:
        plan: of the batch.
        vectors: float [n, E], in the order of `plan.texts`.
    """
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    texts = plan.texts
    apart = [Row((texts[number],), plan.length) for number in broken] if len(texts) > len(plan.rows) else []
    for start in range(0, len(apart), plan.num_rows):
        yield PlannedBatch(tuple(apart[start : start + plan.num_rows]), plan.num_rows, plan.length)


def encode_rows(
    structure: Any, params: Any, batch: Batch, pooling: str, room: int, skip: Array | int = 0
) -> Array:
    """The vectors of all texts in packed rows.

    Args:
        structure, params: of the decoder, see `sgpt_jax.decoder.model.split`.
        batch: R rows, without prefixes.
        pooling: see `sgpt_jax.pool`.
        room: S, how many texts a row has room for.
        skip: int [] or [R, S]; so many first tokens of each text are left out of the pooling, see `pool_texts`.

    Returns:
        float32 [R, S, M E]; zeros where there is no text.

    Raises:
        ValueError: for an unknown pooling mode.
    """
    hidden = merge(structure, params)(
        batch.input_ids, positions=batch.positions, segments=batch.segments, dropout_keys=batch.dropout_keys
    )
    texts = jnp.arange(1, 1 + room)
    return pool_texts(hidden, batch.segments[:, None] == texts[:, None], pooling, skip)


@functools.partial(DecoderProgram, static_argnames=("pooling", "room", "dimension", "normalize"))
def embed(
    structure: Any,
    params: Any,
    modules: Modules,
    batch: Batch,
    skip: Array | int,
    *,
    pooling: str,
    room: int,
    dimension: int,
    normalize: bool,
    mesh: Mesh | None,
) -> Array:
    """The vectors of packed rows: pooled, through the modules, cut, and L2-normalised if `normalize`.

    Args:
        structure, params, batch, skip, pooling, room: see `encode_rows`.
        modules: see `apply_modules`.
        dimension: D, how many dimensions are kept.
        normalize: scale what is kept to length 1.
        mesh: the devices, or None.

    Returns:
        float32 [R, room, D], replicated.
    """
    with on_mesh(mesh):
        vectors = encode_rows(structure, params, batch, pooling, room, skip)
    vectors = apply_modules(vectors, modules)[..., :dimension]
    if normalize:
        vectors = l2_normalize(vectors)
    if mesh is not None:
        vectors = jax.lax.with_sharding_constraint(vectors, NamedSharding(mesh, PartitionSpec()))
    return vectors
