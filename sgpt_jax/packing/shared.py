"""Several texts behind one prefix, for log-probabilities: what continues the same prefix shares its computation.

Each text sees the prefix and itself, and its positions go on from the prefix's end, so that its log-probabilities are
those that it would get alone. Its first token is predicted by the prefix's last. Its own last token is not in the row,
as nothing that it would predict is asked for.

Nothing is shared between different prefixes, although all begin with the words of the prompt before the document: with
the default prompt these are about 15 tokens in front of several hundred.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from sgpt_jax.decoder.batch import Targets
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.flops import layer_weights
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import LENGTH_UNIT, PlannedBatch, Row, round_up

# Limit on the attention scores of a row, float32 [N, T, T], that several pairs share; a single pair may exceed it.
_SCORE_BYTES = 512 * 2**20

Pair = tuple[int, int]
"""(prefix, continuation), as indices into the two lists of token ids."""


def row_room(prefix_length: int, config: DecoderConfig) -> int:
    """How many tokens of continuations a row should hold at most.

    A longer row repeats the prefix less often, but attention costs the square of its length. With a cost of
    a T + b T^2 for a row of T = P + x tokens, the cost per continuation token is least at x = sqrt(P^2 + P a / b);
    a / b is a layer's weights over twice its attention width.

    Where rotations depend on the length of a text, there is no room for a second one: pairs of different lengths would
    need the prefix rotated differently.
    """
    if config.rotation_depends_on_length:
        return 0
    width = config.num_heads * config.head_dim
    best = math.isqrt(prefix_length**2 + prefix_length * layer_weights(config) // (2 * width))
    longest_row = math.isqrt(_SCORE_BYTES // (4 * config.num_heads))
    return min(best, longest_row - prefix_length)


def row_length(tokens: int) -> int:
    """The length of a row for so many tokens: 16, 32, 48, 64, then four to each doubling.

    These are more lengths than in `length_buckets`, as no shorter texts fill what is left of a row.
    """
    return round_up(tokens, LENGTH_UNIT, steps=4)


def shared_rows(
    pairs: Sequence[Pair],
    prefix_lengths: Sequence[int],
    continuation_lengths: Sequence[int],
    config: DecoderConfig,
) -> list[Row]:
    """Rows that hold every pair exactly once; their texts are indices of pairs.

    A prefix whose continuations have more tokens than `row_room` gets several rows, of about equal length.

    Args:
        pairs: what is to be computed, without repetitions.
        prefix_lengths: tokens of every prefix, at least 1.
        continuation_lengths: tokens of every continuation, at least 1.
        config: the decoder's, for the costs of `row_room`.
    """
    by_prefix: dict[int, list[int]] = {}
    for index, (prefix, _) in enumerate(pairs):
        by_prefix.setdefault(prefix, []).append(index)

    def size(index: int) -> int:
        return continuation_lengths[pairs[index][1]]

    rows = []
    for prefix, indices in by_prefix.items():
        length = prefix_lengths[prefix]
        count = -(-sum(map(size, indices)) // max(1, row_room(length, config)))
        # The longest first, each to the row with the fewest tokens: a heap of (tokens, number, pairs).
        filling: list[tuple[int, int, list[int]]] = [
            (0, number, []) for number in range(min(count, len(indices)))
        ]
        for index in sorted(indices, key=size, reverse=True):
            filled, number, content = filling[0]
            content.append(index)
            heapq.heapreplace(filling, (filled + size(index), number, content))
        for filled, _, content in sorted(filling, key=lambda entry: entry[1]):
            # At least as long as it has targets, `filled`, so that a batch's targets fit in an array of its size.
            tokens = max(length + filled - len(content), filled)
            rows.append(Row(tuple(content), row_length(tokens), prefix))
    return rows


def lay_out_targets(
    plan: PlannedBatch,
    pairs: Sequence[Pair],
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    num_shards: int = 1,
) -> tuple[Targets, np.ndarray]:
    """What is to be predicted in a batch of shared rows: all tokens of its continuations.

    Args:
        plan: of the batch.
        pairs, prefixes, continuations: see `shared_rows`; token ids.
        num_shards: W, into how many shards the batch's rows are split.

    Returns:
        the targets, int32 [W, M], and the index of each one's pair, int32 [W, M], -1 where there is no target. M is
        the tokens of a shard, padding included.

    Raises:
        InputError: when the rows of a batch do not divide by `num_shards`.
    """
    if plan.num_rows % num_shards:
        raise InputError(f"{plan.num_rows} rows cannot be split over {num_shards} devices")
    shard_rows = plan.num_rows // num_shards
    shape = (num_shards, shard_rows * plan.length)
    states = np.zeros(shape, np.int32)
    token_ids, owners = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    used = [0] * num_shards
    for number, row in enumerate(plan.rows):
        assert row.prefix is not None
        shard, first = number // shard_rows, number % shard_rows * plan.length
        last_of_prefix = first + len(prefixes[row.prefix]) - 1
        end = last_of_prefix + 1
        for index in row.texts:
            tokens = continuations[pairs[index][1]]
            span = slice(used[shard], used[shard] + len(tokens))
            states[shard, span] = [last_of_prefix, *range(end, end + len(tokens) - 1)]
            token_ids[shard, span] = tokens
            owners[shard, span] = index
            end, used[shard] = end + len(tokens) - 1, span.stop
    return Targets(states, token_ids), owners
