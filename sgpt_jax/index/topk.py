"""Exact top-k over vectors that arrive in blocks: the scores live on the device, one block at a time.

Equal scores rank by document id, descending as strings, which is trec_eval's order; this holds at the cut as
well, where the last places go to the highest of all the ids that share the score.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sgpt_jax.errors import InputError

MAX_QUERIES = 512  # a pass over the blocks; more queries take more passes


@dataclass(frozen=True)
class Block:
    """Rows of an index: ``vectors`` [B, E], of which ``[first:last]`` count, row ``start + i`` at position i."""

    vectors: np.ndarray
    scales: np.ndarray | None  # [B] float32, factor of each row, or None
    start: int
    first: int
    last: int


@jax.jit
def _block_scores(queries: jax.Array, offsets: jax.Array, vectors: jax.Array, scales: jax.Array | None):
    """Scores [Q, B] float32. A program of its own, so that a second pass finds the same bits."""
    scores = jax.lax.dot_general(
        queries,
        vectors.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scores if scales is None else scores * scales + offsets[:, None]


@partial(jax.jit, static_argnames="k")
def _merge(best: tuple[jax.Array, jax.Array], scores: jax.Array, place: jax.Array, k: int):
    """The k best of (scores, rows) so far and of one block; ``place`` is (start, first, last) of the block."""
    positions = jnp.arange(scores.shape[1], dtype=jnp.int32)
    inside = (positions >= place[1]) & (positions < place[2])
    block_scores, found = jax.lax.top_k(jnp.where(inside, scores, -jnp.inf), min(k, scores.shape[1]))
    all_scores = jnp.concatenate([best[0], block_scores], axis=1)
    all_rows = jnp.concatenate([best[1], found + place[0]], axis=1)
    top_scores, order = jax.lax.top_k(all_scores, k)
    return top_scores, jnp.take_along_axis(all_rows, order, axis=1)


def exact_top_k(
    queries: np.ndarray,
    offsets: np.ndarray,
    blocks: Callable[[], Iterable[Block]],
    rows: int,
    k: int,
    ids: Callable[[np.ndarray], list[str]],
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k rows with the highest ``vectors @ query`` (times scale, plus offset, where there are scales).

    Args:
        queries: [Q, E] float32.
        offsets: [Q] float32, added to the scores of rows that have scales.
        blocks: starts a pass over the blocks, all of one shape.
        rows: how many rows the blocks hold in all.
        k: results a query; more than ``rows`` gives all of them.
        ids: the ids of some rows, asked for where scores are equal only.

    Raises:
        InputError: a score is NaN or infinite.

    Returns:
        scores [Q, min(k, rows)] float32 and rows of the same shape, int64, best first.
    """
    k = min(k, rows)
    passes = max(1, -(-len(queries) // MAX_QUERIES))
    parts = [
        _one_pass(part, part_offsets, blocks, rows, k, ids)
        for part, part_offsets in zip(
            np.array_split(queries, passes), np.array_split(offsets, passes), strict=True
        )
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _one_pass(
    queries: np.ndarray,
    offsets: np.ndarray,
    blocks: Callable[[], Iterable[Block]],
    rows: int,
    k: int,
    ids: Callable[[np.ndarray], list[str]],
) -> tuple[np.ndarray, np.ndarray]:
    count = len(queries)
    # few different shapes, so that few programs are compiled: 1, 2, 4, 8, 16, 32, 48, ...
    padded = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
    device_queries = jax.device_put(np.pad(queries, ((0, padded - count), (0, 0))))
    device_offsets = jax.device_put(np.pad(offsets, (0, padded - count)))
    wanted = min(k + 1, rows)  # one more shows whether the cut goes through equal scores
    best = (jnp.full((padded, wanted), -jnp.inf), jnp.full((padded, wanted), -1, jnp.int32))
    earlier = best
    for block, scores in _scored(device_queries, device_offsets, blocks):
        # Not more than two blocks wait on the device, and the next one moves there while this one is worked on.
        jax.block_until_ready(earlier)
        earlier = best
        place = np.array([block.start, block.first, block.last], np.int32)
        best = _merge(best, scores, place, k=wanted)
    top_scores, top_rows = (np.asarray(part)[:count] for part in best)
    if not np.isfinite(top_scores).all():
        raise InputError("the vectors are too large or damaged: a score is NaN or infinite")
    top_scores = top_scores + np.float32(0)  # -0.0 equals 0.0 and is shown as such

    cut = top_scores[:, k - 1] == top_scores[:, -1] if wanted > k else np.zeros(count, bool)
    tied = (top_scores[:, 1:] == top_scores[:, :-1]).any(axis=1)
    result_scores, result_rows = top_scores[:, :k].copy(), top_rows[:, :k].astype(np.int64)
    more: dict[int, np.ndarray] = {}
    if cut.any():
        levels = {int(query): top_scores[query, k - 1] for query in np.flatnonzero(cut)}
        more = _rows_at(levels, _scored(device_queries, device_offsets, blocks), k, ids)
    for query in np.flatnonzero(tied):
        candidates = dict(zip(top_rows[query].tolist(), top_scores[query].tolist(), strict=True))
        for row in more.get(int(query), np.zeros(0, np.int64)).tolist():
            candidates.setdefault(row, top_scores[query, k - 1].item())
        names = ids(np.fromiter(candidates, np.int64))
        ranked = sorted(
            zip(candidates.values(), names, candidates, strict=True),
            key=lambda entry: entry[:2],
            reverse=True,
        )
        result_scores[query] = [score for score, _, _ in ranked[:k]]
        result_rows[query] = [row for _, _, row in ranked[:k]]
    return result_scores, result_rows


def _scored(
    queries: jax.Array, offsets: jax.Array, blocks: Callable[[], Iterable[Block]]
) -> Iterator[tuple[Block, jax.Array]]:
    for block in blocks():
        scales = None if block.scales is None else jax.device_put(block.scales)
        yield block, _block_scores(queries, offsets, jax.device_put(block.vectors), scales)


def _rows_at(
    levels: dict[int, np.float32],
    scored: Iterable[tuple[Block, jax.Array]],
    k: int,
    ids: Callable[[np.ndarray], list[str]],
) -> dict[int, np.ndarray]:
    """For each query, of the rows whose score is exactly its level, the k with the highest ids."""
    found = {query: np.zeros(0, np.int64) for query in levels}

    def keep(rows: np.ndarray) -> np.ndarray:
        names = ids(rows)
        order = sorted(range(len(rows)), key=names.__getitem__, reverse=True)
        return rows[order[:k]]

    for block, scores in scored:
        host_scores = np.asarray(scores)
        for query, level in levels.items():
            hits = np.flatnonzero(host_scores[query, block.first : block.last] == level)
            rows = np.concatenate([found[query], hits + (block.start + block.first)])
            found[query] = keep(rows) if len(rows) > 4 * k + 1000 else rows
    return {query: keep(rows) for query, rows in found.items()}
