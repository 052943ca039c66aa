"""What a teacher is asked, and what its answers become: lists of candidates, and scores with a fitted temperature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sgpt_jax.bm25 import Bm25
from sgpt_jax.metrics import Run
from sgpt_jax.runtime.progress import progress

# How deep a query's BM25 ranking is read for others that are still free.
_DEPTH = 200
# Temperatures between which the one is searched that gives the wanted entropy.
_COLDEST, _HOTTEST = 1e-4, 1e5


def group(queries: Mapping[str, str], index: Bm25, size: int, draw: np.random.Generator) -> list[list[str]]:
    """Groups of queries whose ids BM25 finds for each other: each one's document is a candidate of all in its group.

    So a batch of n queries has hard candidates among n documents, and a teacher reads each document once. A query,
    taken at random, is joined by the free ones of its best ranks; those that find no free ones are put together at
    the end.

    Args:
        queries: {id: text}.
        index: of documents, or of the queries, with these ids and perhaps others.
        size: of a group; the last one may have fewer.
        draw: the random order.

    Returns:
        lists of ids; every id is in one of them.
    """
    ids = list(queries)
    free = dict.fromkeys(ids)
    groups: list[list[str]] = []
    left: list[str] = []
    with progress("BM25: candidates", "query", len(ids)) as bar:
        for number in draw.permutation(len(ids)).tolist():
            bar.update()
            if ids[number] not in free:
                continue
            del free[ids[number]]
            found = [ids[number]]
            for id in index.candidates(queries[ids[number]], _DEPTH):
                if len(found) == size:
                    break
                if id in free:
                    del free[id]
                    found.append(id)
            if len(found) == size:
                groups.append(found)
            else:
                left += found
    groups += [left[start : start + size] for start in range(0, len(left), size)]
    return groups


def temperature(lists: Iterable[Sequence[float]], entropy: float) -> float:
    """The temperature by which the mean entropy of the lists' softmax is `entropy` nats, as near as it can be.

    A decoder's log-probabilities of a query differ by 5 to 30 nats between documents: as they are, all of the softmax
    is on one document, and a student learns no order from it.

    Args:
        lists: scores; those of fewer than two are passed over.
        entropy: between 0 and the logarithm of the lists' length.
    """
    several = [np.asarray(scores, np.float64) for scores in lists if len(scores) > 1]
    if not several:
        return 1.0
    low, high = np.log(_COLDEST), np.log(_HOTTEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(several, np.exp(middle)) < entropy else (low, middle)
    return float(np.exp(low))


def mean_entropy(lists: Iterable[Sequence[float] | np.ndarray], degrees: float) -> float:
    """The mean entropy, in nats, of the softmax of lists of scores at a temperature; NaN without lists of two."""
    several = [np.asarray(scores, np.float64) for scores in lists if len(scores) > 1]
    return float(np.mean([_entropy(scores / degrees) for scores in several])) if several else np.nan


def _entropy(scores: np.ndarray) -> float:
    """Of the softmax, in nats."""
    weights = np.exp(scores - scores.max())
    probabilities = weights / weights.sum()
    return float(-np.sum(probabilities * np.log(np.maximum(probabilities, 1e-300))))


def source_ranks(scores: Run) -> dict[str, int]:
    """The rank, from 1, of the document with the query's own id among those scored for it; ties count against it."""
    return {query: sum(score >= found[query] for score in found.values()) for query, found in scores.items()}
