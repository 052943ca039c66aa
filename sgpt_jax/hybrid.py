"""Hybrid search: BM25 and a bi-encoder over the same documents, joined by their scaled scores."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sgpt_jax.bm25 import Bm25
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.search import Index
from sgpt_jax.metrics import Run, rank
from sgpt_jax.runtime.progress import progress

# Documents of each ranking that are fused. The last of them has nothing from that ranking, so it must be deep.
DEPTH = 1000
_CHUNK = 4096


def fuse(run: Run, words: Run, k: int) -> dict[str, dict[str, float]]:
    """The k best documents of every query by the mean of their scores, scaled to 0..1 for each ranking and query.

    A ranking's best document has 1 and the last of its first 1,000 has 0, as has one that is not among them (min-max
    normalisation and a convex combination, here with equal weights: Bruch, Gai and Ingber, ACM TOIS 42(1), 2023; see
    eval/results/adapt beside reciprocal rank fusion). Where BM25 finds fewer, the scale begins at its 0, the score of
    what shares no word with the query. Where all scores of a query are equal, all have 1; infinite ones have 1 or 0,
    and do not count for the scale. Ties rank as everywhere (`sgpt_jax.metrics.rank`).

    Args:
        run: {query id: {document id: score}} of any first stage, to a depth of 1,000 or of all documents.
        words: BM25's. A query need not be in both.
        k: documents to keep.

    Returns:
        {query id: {document id: fused score}}, best first.
    """
    fused: dict[str, dict[str, float]] = {}
    for ranking in (run, words):
        for query, hits in ranking.items():
            scores = fused.setdefault(query, {})
            best = rank(hits, DEPTH, query=query)
            finite = [score for score in best.values() if math.isfinite(score)] or [0.0]
            low, high = min(finite), max(finite)
            if ranking is words and len(best) < DEPTH:
                low = 0.0
            for document, score in best.items():
                scaled = (score - low) / (high - low) if high > low else float(score >= low)
                scores[document] = scores.get(document, 0.0) + min(max(scaled, 0.0), 1.0) / 2
    return {query: rank(scores, k) for query, scores in fused.items()}


def bm25_of(index: Index) -> tuple[Bm25, dict[str, int]]:
    """BM25 over the texts that an index holds, and the row of each document id.

    All texts are read, and their words are held in memory.

    Raises:
        InputError: the index holds no texts, they are damaged, or bm25s is not installed.
    """
    rows: dict[str, int] = {}

    def documents() -> Iterator[Document]:
        with progress("reading texts", "doc", len(index)) as bar:
            for start in range(0, len(index), _CHUNK):
                numbers = index.rows(start, start + _CHUNK)
                for row, id, text in zip(
                    numbers.tolist(), index.ids(numbers), index.texts(numbers), strict=True
                ):
                    rows[id] = row
                    yield Document(id, text)
                bar.update(len(numbers))

    return Bm25(documents()), rows
