"""Exact top-k over vectors that pass by once, in blocks: scores live on the device, one block at a time.

Equal scores rank by document id, descending as strings, which is trec_eval's order. This holds at the cut as well,
where the last ranks go to the highest of all the ids that share the score: rows that tie with the k-th and do not fit
are remembered until the k-th score rises.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.metrics import rank
from sgpt_jax.runtime.forks import check_fork
from sgpt_jax.runtime.one_behind import one_behind

MAX_QUERIES = 512  # scored at a time: scores are [512, rows of a block]
CHUNK = 128  # scores whose maximum tells whether any of them matters

Ids = Callable[[np.ndarray], list[str]]
_Arrays = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Block:
    """Rows ``[start, start + B)`` of a corpus: ``vectors`` [B, E], of which ``[first:last]`` count, but for those that
    ``removed`` [B] bool names."""

    vectors: np.ndarray
    scales: np.ndarray | None  # [B] float32, factor of each row, or None
    start: int
    first: int
    last: int
    removed: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many rows count."""
        removed = 0 if self.removed is None else int(self.removed[self.first : self.last].sum())
        return self.last - self.first - removed


def exact_top_k(
    queries: np.ndarray, offsets: np.ndarray, blocks: Iterable[Block], k: int, ids: Ids
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k rows with the highest ``vectors @ query`` (times scale, plus offset, where there are scales).

    Products are float32 at full precision. Memory holds two blocks, their scores for `MAX_QUERIES` queries, and k + 1
    candidates a query.

    Args:
        queries: [Q, E] float32.
        offsets: [Q] float32, added to the scores of rows that have scales.
        blocks: all of one shape (each shape compiles a program), iterated once; every row counts in one block.
        k: results a query.
        ids: the ids of some rows that have passed by, asked for where scores are equal only.

    Returns:
        scores [Q, min(k, n)] float32 and rows of the same shape, int64, best first, of the n rows that passed by.

    Raises:
        InputError: a score is NaN or infinite.
    """
    check_fork()
    parts = max(1, -(-len(queries) // MAX_QUERIES))
    groups = [
        _Queries(part, part_offsets, k, ids)
        for part, part_offsets in zip(
            np.array_split(queries, parts), np.array_split(offsets, parts), strict=True
        )
    ]
    count = 0

    def started() -> Iterator[tuple[_Queries, Block, jax.Array, _Arrays, _Arrays]]:
        nonlocal count
        for block in blocks:
            count += block.count
            vectors = jax.device_put(block.vectors)
            scales = None if block.scales is None else jax.device_put(block.scales)
            for group in groups:
                yield group, block, *group.look_at(block, vectors, scales)

    for _ in one_behind(started(), lambda item: item[0].keep_ties(*item[1:])):
        pass
    results = [group.result(min(k, count)) for group in groups]
    return np.concatenate([scores for scores, _ in results]), np.concatenate([rows for _, rows in results])


def chunk_top_k(scores: jax.Array, maxima: jax.Array, k: int, most: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of scores [Q, B] by way of the maxima of chunks of `CHUNK`: the k best lie in the k best chunks.

    Among equal scores at the cut any may be taken.

    Args:
        scores: [Q, B] with B a multiple of `CHUNK`.
        maxima: [Q, B / CHUNK] of the chunks.
        k: how many; fewer come out where B is smaller, or ``most`` chunks hold fewer.
        most: no more than so many chunks matter.

    Returns:
        scores and their columns [Q, <= k], best first.
    """
    chunks = min(k, most, maxima.shape[1])
    if chunks == maxima.shape[1]:
        return jax.lax.top_k(scores, min(k, scores.shape[1]))
    _, found = jax.lax.top_k(maxima, chunks)
    parts = jnp.take_along_axis(scores.reshape(len(scores), -1, CHUNK), found[:, :, None], axis=1)
    top, order = jax.lax.top_k(parts.reshape(len(scores), -1), min(k, chunks * CHUNK))
    return top, jnp.take_along_axis(found, order // CHUNK, axis=1) * CHUNK + order % CHUNK


def padded_count(count: int) -> int:
    """Queries with padding: few different numbers, so that few programs are compiled: 1, 2, 4, 8, 16, 32, 48, ..."""
    return 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16


def in_order(scores: np.ndarray, rows: np.ndarray, ids: Ids) -> None:
    """Puts rows [Q, k] with equal scores in the order of their ids, descending, where scores fall along k."""
    for query in np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1)).tolist():
        row_of = dict(zip(ids(rows[query]), rows[query].tolist(), strict=True))
        ranked = rank({id: scores[query, place].item() for place, id in enumerate(row_of)})
        rows[query] = [row_of[id] for id in ranked]


@jax.jit
def _block_scores(
    queries: jax.Array,
    offsets: jax.Array,
    vectors: jax.Array,
    scales: jax.Array | None,
    removed: np.ndarray | None,
) -> jax.Array:
    """Scores [Q, B] float32, of removed rows -inf; -0.0 is 0.0, which top_k would put first."""
    scores = jax.lax.dot_general(
        queries,
        vectors.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if scales is not None:
        scores = scores * scales + offsets[:, None]
    scores = jnp.where(scores == 0, 0.0, scores)
    return scores if removed is None else jnp.where(removed, -jnp.inf, scores)


@jax.jit
def _merge(best: _Arrays, scores: jax.Array, position: jax.Array) -> tuple[_Arrays, jax.Array]:
    """The best (scores, rows) [Q, k + 1] so far and of one block, and the block's own best scores [Q, <= k + 1].

    ``position`` is (start, first, last) of the block.
    """
    kept = best[0].shape[1]
    columns = jnp.arange(scores.shape[1], dtype=jnp.int32)
    inside = (columns >= position[1]) & (columns < position[2])
    block_scores, found = jax.lax.top_k(jnp.where(inside, scores, -jnp.inf), min(kept, scores.shape[1]))
    all_scores = jnp.concatenate([best[0], block_scores], axis=1)
    all_rows = jnp.concatenate([best[1], found + position[0]], axis=1)
    top_scores, order = jax.lax.top_k(all_scores, kept)
    return (top_scores, jnp.take_along_axis(all_rows, order, axis=1)), block_scores


@jax.jit
def _ties(before: jax.Array, after: jax.Array, block_scores: jax.Array) -> _Arrays:
    """The k-th scores [Q] after a merge, and whether rows with just this score may have been lost in it [Q]: more have
    it than there are ranks, and some of those are in the block, or had to make way for higher ones of the block.

    A program of its own: where a part of top_k's result is used in the same one, XLA sorts the whole block on a CPU (10
    times the time).
    """
    levels = after[:, -2]
    tied = (levels == after[:, -1]) & jnp.isfinite(levels)
    come = (block_scores == levels[:, None]).any(axis=1)
    gone = (before == levels[:, None]).any(axis=1) & (block_scores[:, 0] > levels)
    return levels, tied & (come | gone)


@partial(jax.jit, static_argnames=("rows", "kept"))
def _nothing(rows: int, kept: int) -> tuple[jax.Array, jax.Array]:
    return jnp.full((rows, kept), -jnp.inf), jnp.full((rows, kept), -1, jnp.int32)


class _Queries:
    """Some queries on the device and the best rows so far: k and one more, which shows a tie at the cut."""

    def __init__(self, queries: np.ndarray, offsets: np.ndarray, k: int, ids: Ids) -> None:
        self._count, self._k, self._ids = len(queries), k, ids
        count = self._count
        padded = padded_count(count)
        self._queries = jax.device_put(np.pad(queries, ((0, padded - count), (0, 0))))
        self._offsets = jax.device_put(np.pad(offsets, (0, padded - count)))
        self._best = _nothing(padded, k + 1)
        self._ties: dict[int, tuple[float, np.ndarray]] = {}  # query -> level, rows that have it

    def look_at(
        self, block: Block, vectors: jax.Array, scales: jax.Array | None
    ) -> tuple[jax.Array, _Arrays, _Arrays]:
        """Starts the work on a block; what it gives goes to `keep_ties`."""
        scores = _block_scores(self._queries, self._offsets, vectors, scales, block.removed)
        position = np.array([block.start, block.first, block.last], np.int32)
        before = self._best
        self._best, block_scores = _merge(before, scores, position)
        return scores, before, _ties(before[0], self._best[0], block_scores)

    def keep_ties(self, block: Block, scores: jax.Array, before: _Arrays, ties: _Arrays) -> None:
        """Remembers all rows with the score at the cut, where some of them may have been lost."""
        levels, lost = (np.asarray(part)[: self._count] for part in ties)
        if not lost.any():
            return
        host_scores, (old_scores, old_rows) = np.asarray(scores), map(np.asarray, before)
        for query in np.flatnonzero(lost).tolist():
            level = levels[query].item()
            rows = np.flatnonzero(host_scores[query, block.first : block.last] == level)
            rows = np.concatenate(
                [rows + (block.start + block.first), old_rows[query, old_scores[query] == level]]
            )
            if query in self._ties and self._ties[query][0] == level:
                rows = np.union1d(self._ties[query][1], rows)
            if len(rows) > 4 * self._k + 1000:  # no more than k can be among the results
                order = sorted(zip(self._ids(rows), rows.tolist(), strict=True), reverse=True)
                rows = np.array([row for _, row in order[: self._k]], np.int64)
            self._ties[query] = level, rows

    def result(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows [Q, k], k not above the rows that have passed by."""
        scores, rows = (np.asarray(part)[: self._count] for part in self._best)
        result_scores, result_rows = scores[:, :k].copy(), rows[:, :k].astype(np.int64)
        if not np.isfinite(result_scores).all():
            raise InputError("the vectors are too large or damaged: a score is NaN or infinite")
        tied = (scores[:, 1 : k + 1] == scores[:, :k]) & np.isfinite(scores[:, 1 : k + 1])
        for query in np.flatnonzero(tied.any(axis=1)).tolist():
            valid = np.isfinite(scores[query])
            found = dict(zip(rows[query, valid].tolist(), scores[query, valid].tolist(), strict=True))
            level, others = self._ties.get(query, (None, np.zeros(0, np.int64)))
            if level == scores[query, k - 1]:
                found |= dict.fromkeys(others.tolist(), level)
            row_of = dict(zip(self._ids(np.fromiter(found, np.int64)), found, strict=True))
            ranked = rank({id: found[row] for id, row in row_of.items()}, k)
            result_scores[query] = list(ranked.values())
            result_rows[query] = [row_of[id] for id in ranked]
        return result_scores, result_rows
