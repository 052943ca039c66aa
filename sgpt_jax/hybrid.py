"""Hybrid search: BM25 and a bi-encoder over the same documents, joined by reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sgpt_jax.bm25 import Bm25
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.search import Index
from sgpt_jax.metrics import Run, rank
from sgpt_jax.runtime.progress import progress

# Documents of each ranking that are fused.
DEPTH = 1000
# The constant of the formula, as in its source.
CONSTANT = 60
_CHUNK = 4096


def fuse(runs: Sequence[Run], k: int) -> dict[str, dict[str, float]]:
    """The k best documents of every query by reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    A document's score is the sum over the runs of 1 / (60 + its rank there), from 1; scores of different kinds need
    no common scale so. Ties rank as everywhere (`sgpt_jax.metrics.rank`).

    Args:
        runs: {query id: {document id: score}}; a query need not be in all of them.
        k: documents to keep.

    Returns:
        {query id: {document id: fused score}}, best first.
    """
    fused: dict[str, dict[str, float]] = {}
    for run in runs:
        for query, hits in run.items():
            scores = fused.setdefault(query, {})
            for place, document in enumerate(rank(hits, DEPTH, query=query), 1):
                scores[document] = scores.get(document, 0.0) + 1 / (CONSTANT + place)
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
