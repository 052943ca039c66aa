"""Plans of shared passes: texts that continue the same prefix are packed behind it, so that it is computed once.

A row of the decoder's input is one prefix in segment 0 and its continuations in segments 1, 2, 3, ... Each of these
sees the prefix and itself, and its positions go on from the prefix's end, so that it gets the very numbers it would
get alone. Its last token predicts nothing that is asked for and is left out; its first is predicted by the prefix's
last.

What different prefixes have in common, the words before the document, is computed for each of them: with the default
prompt these are about 15 tokens in front of several hundred.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError

# What attention scores of a shared row, float32 [N, T, T], may take at most; a single pair's row takes what it takes.
_SCORE_BYTES = 512 * 2**20

Pair = tuple[int, int]
"""(prefix, continuation), as indices into the two lists of token ids."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prefix, the pairs whose continuations follow it, and the slots that this takes."""

    prefix: int
    pairs: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run together, as a [rows, length] array. What is beyond `len(indices)` is empty."""

    indices: tuple[int, ...]
    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class Pass:
    """What one call of the decoder gets, and which of its hidden states predict what.

    Attributes:
        input_ids, positions, segments: int32 [B, T]; segment -1 is padding.
        slots: int32 [W, M]: places of hidden states, counted through the B / W rows of each of W devices.
        targets: int32 [W, M]: the token that each of them is to predict.
        counts: how many of the M are in use, for each of the W.
        pairs: the pairs in the order in which their targets stand, for each of the W.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    counts: list[int]
    pairs: list[list[int]]


def row_room(prefix_length: int, config: DecoderConfig) -> int:
    """How many tokens of continuations a row should hold at most.

    A longer row repeats the prefix less often, but attention costs the square of its length. With a cost of
    a T + b T^2 for a row of T = P + x tokens, the cost per continuation token is least at x = sqrt(P^2 + P a / b);
    a / b is a layer's weights over twice its attention width.
    """
    width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    weights = config.embed_dim * (2 * width + 2 * kv_width + (3 if config.gated else 2) * config.mlp_dim)
    best = math.isqrt(prefix_length**2 + prefix_length * weights // (2 * width))
    longest_row = math.isqrt(_SCORE_BYTES // (4 * config.num_heads))
    return min(best, longest_row - prefix_length)


def plan_rows(
    pairs: Sequence[Pair],
    prefix_lengths: Sequence[int],
    continuation_lengths: Sequence[int],
    config: DecoderConfig,
    *,
    share: bool = True,
) -> list[Row]:
    """Rows that hold every pair exactly once.

    A prefix with more continuations than `row_room` gets several rows, as equal as they can be.

    Args:
        pairs: what is to be computed, without repetitions.
        prefix_lengths: tokens of every prefix, at least 1.
        continuation_lengths: tokens of every continuation, at least 1.
        config: the decoder's, for the costs of `row_room`.
        share: False gives every pair a row of its own.
    """
    members: dict[int, list[int]] = {}
    for number, (prefix, _) in enumerate(pairs):
        members.setdefault(prefix, []).append(number)

    def size(number: int) -> int:
        return continuation_lengths[pairs[number][1]]

    rows = []
    for prefix, numbers in members.items():
        total = sum(map(size, numbers))
        if share:
            parts = -(-total // max(1, row_room(prefix_lengths[prefix], config)))
        else:
            parts = len(numbers)
        # The longest first, each to the row that has least.
        filling: list[tuple[int, int, list[int]]] = [
            (0, part, []) for part in range(min(parts, len(numbers)))
        ]
        for number in sorted(numbers, key=size, reverse=True):
            filled, part, content = filling[0]
            content.append(number)
            heapq.heapreplace(filling, (filled + size(number), part, content))
        for filled, _, content in sorted(filling, key=lambda entry: entry[1]):
            # At least a slot for each target, so that targets never outnumber the slots of a batch.
            length = max(prefix_lengths[prefix] + filled - len(content), filled)
            rows.append(Row(prefix, tuple(content), length))
    return rows


def row_buckets(longest: int) -> list[int]:
    """Padded lengths up to the first that holds `longest`: 16, 32, 48, 64, then four steps to each doubling."""
    buckets = [16, 32, 48, 64]
    while buckets[-1] < longest:
        buckets.append(buckets[-1] + (1 << buckets[-1].bit_length() - 3))
    return buckets


def plan_batches(rows: Sequence[Row], *, batch_tokens: int, row_multiple: int = 1) -> list[Batch]:
    """Groups rows into batches of few shapes, longest first; `Batch.indices` are indices into `rows`.

    A batch has the length of its longest row's bucket (`row_buckets`) and as many rows as `batch_tokens` allows, a
    multiple of `row_multiple`. Only the last batch may have fewer: a power of two times `row_multiple`.
    """
    order = sorted(range(len(rows)), key=lambda index: -rows[index].length)
    buckets = row_buckets(max((row.length for row in rows), default=1))
    batches = []
    start = 0
    while start < len(order):
        longest = rows[order[start]].length
        length = next(bucket for bucket in buckets if bucket >= longest)
        count = max(1, batch_tokens // (length * row_multiple)) * row_multiple
        left = len(order) - start
        if left < count:
            count = min(count, row_multiple << (-(-left // row_multiple) - 1).bit_length())
        batches.append(Batch(tuple(order[start : start + count]), count, length))
        start += count
    return batches


def make_pass(
    batch: Batch,
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    pad_id: int,
    block: int,
    ways: int = 1,
) -> Pass:
    """The arrays of a batch.

    Args:
        batch: from `plan_batches`.
        rows: from `plan_rows`.
        pairs: what `plan_rows` got.
        prefixes: token ids of every prefix.
        continuations: token ids of every continuation.
        pad_id: a valid token id.
        block: M is rounded up to a multiple of it.
        ways: W, the devices that share the batch's rows; divides `batch.rows`.

    Raises:
        InputError: when the rows of a batch do not divide by `ways`.
    """
    if batch.rows % ways:
        raise InputError(f"{batch.rows} rows cannot be split over {ways} devices")
    shape = (batch.rows, batch.length)
    input_ids = np.full(shape, pad_id, np.int32)
    positions = np.zeros(shape, np.int32)
    segments = np.full(shape, -1, np.int32)
    rows_each = batch.rows // ways
    most = -(-rows_each * batch.length // block) * block
    slots = np.zeros((ways, most), np.int32)
    targets = np.zeros((ways, most), np.int32)
    counts = [0] * ways
    order: list[list[int]] = [[] for _ in range(ways)]
    for place, index in enumerate(batch.indices):
        row, way = rows[index], place // rows_each
        first_slot = place % rows_each * batch.length
        prefix = prefixes[row.prefix]
        used = len(prefix)
        input_ids[place, :used] = prefix
        positions[place, :used] = np.arange(used)
        segments[place, :used] = 0
        for segment, number in enumerate(row.pairs, 1):
            tokens = continuations[pairs[number][1]]
            here = slice(used, used + len(tokens) - 1)
            input_ids[place, here] = tokens[:-1]
            positions[place, here] = np.arange(len(prefix), len(prefix) + len(tokens) - 1)
            segments[place, here] = segment
            there = slice(counts[way], counts[way] + len(tokens))
            slots[way, there] = first_slot + np.concatenate(
                [[len(prefix) - 1], np.arange(here.start, here.stop)]
            )
            targets[way, there] = tokens
            used, counts[way] = here.stop, there.stop
            order[way].append(number)
    return Pass(input_ids, positions, segments, slots, targets, counts, order)
