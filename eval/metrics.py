"""Retrieval metrics: those of pytrec_eval, with everything around them stated in one place.

Scores are compared as float32 and ties rank by document id, descending, as in trec_eval. The gain is
max(grade, 0), linear; the ideal list comes from all judged documents. Means are over every judged query
that the queries file holds: one without hits counts 0, and so does one without any relevant document (BEIR
and mteb).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytrec_eval

from sgpt_jax.errors import InputError

CUTS = (1, 3, 5, 10, 100, 1000)
_MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Evaluation:
    """Means, values per query and counts of one run.

    ``metrics`` and ``per_query`` have keys such as ``ndcg@10``; the values of ``per_query`` are in the order
    of ``queries``.
    """

    metrics: dict[str, float]
    queries: list[str]
    per_query: dict[str, list[float]]
    counts: dict[str, int] = field(default_factory=dict)


def top(
    query: str, scores: Mapping[str, float], k: int, *, ignore: str | None = None
) -> list[tuple[str, float]]:
    """The best k documents as (id, score), by trec_eval's order: float32 score, then id, both descending.

    Args:
        query: the query's id, for messages.
        scores: {document id: score}; infinities are legal.
        k: how many to keep; all of them when there are fewer.
        ignore: a document id that is dropped before the cut.

    Raises:
        InputError: a NaN score, with query and document id.
    """
    with np.errstate(over="ignore"):  # beyond float32 means infinity there, as in trec_eval
        rounded = np.fromiter(scores.values(), np.float32, len(scores)).tolist()
    entries = []
    for document, score in zip(scores, rounded, strict=True):
        if math.isnan(score):
            raise InputError(f"the score of query {query!r}, document {document!r} is NaN")
        if document != ignore:
            entries.append((score, document))
    best = sorted(entries, reverse=True) if len(entries) <= k else heapq.nlargest(k, entries)
    return [(document, scores[document]) for _, document in best]


def cut(run: Run, k: int, *, ignore_identical_ids: bool = False) -> tuple[dict[str, dict[str, float]], int]:
    """Every query's best k documents in rank order, and how many with the query's own id were dropped.

    The drop comes before the cut, so k documents remain where there are that many others.
    """
    kept, dropped = {}, 0
    for query, scores in run.items():
        own = query if ignore_identical_ids else None
        dropped += own is not None and own in scores
        kept[query] = dict(top(query, scores, k, ignore=own))
    return kept, dropped


def evaluate(
    qrels: Qrels,
    run: Run,
    *,
    queries: Iterable[str] | None = None,
    ignore_identical_ids: bool = False,
    cuts: Sequence[int] = CUTS,
) -> Evaluation:
    """nDCG, MAP, recall, precision and MRR of a run at every cut.

    MRR@k is BEIR's: 1 / rank of the first document with a grade above 0 among the best k, else 0
    (trec_eval's own ``recip_rank`` has no cut).

    Args:
        qrels: {query id: {document id: grade}}.
        run: {query id: {document id: score}}.
        queries: the ids in the queries file; None takes every judged query.
        ignore_identical_ids: drop a document whose id is the query's, before any cut (BEIR: ArguAna, Quora).
        cuts: the ranks at which to measure.

    Raises:
        InputError: a NaN score, or no judged query at all.
    """
    judged = [query for query in qrels if qrels[query]]
    known = set(judged if queries is None else queries)
    names = [query for query in judged if query in known]
    if not names:
        raise InputError("no query that the queries file holds is judged: there is nothing to measure")
    hits, dropped = cut(
        {query: run[query] for query in names if query in run},
        max(cuts),
        ignore_identical_ids=ignore_identical_ids,
    )
    hits = {query: documents for query, documents in hits.items() if documents}
    values = _pytrec(qrels, hits, cuts)
    per_query: dict[str, list[float]] = {}
    for k in cuts:
        for name, measure in _MEASURES.items():
            per_query[f"{name}@{k}"] = [values[q][f"{measure}_{k}"] if q in values else 0.0 for q in names]
        per_query[f"mrr@{k}"] = [_reciprocal_rank(qrels[q], hits.get(q, {}), k) for q in names]
    metrics = {name: math.fsum(column) / len(names) for name, column in per_query.items()}
    counts = {
        "queries": len(names),
        "queries_without_hits": len(names) - len(hits),
        "queries_without_relevant": sum(max(qrels[query].values()) <= 0 for query in names),
        "judged_queries_unknown": len(judged) - len(names),
        "identical_ids_dropped": dropped,
    }
    return Evaluation(metrics, names, per_query, counts)


def _pytrec(qrels: Qrels, hits: Run, cuts: Sequence[int]) -> dict[str, dict[str, float]]:
    """pytrec_eval's values per query. It sees ranks for scores and numbers for ids: the order is settled
    already, and C strings cannot hold every id that JSON can.
    """
    grades, ranked = {}, {}
    for place, (query, documents) in enumerate(hits.items()):
        numbers: dict[str, str] = {}
        grades[str(place)] = {
            numbers.setdefault(document, str(len(numbers))): max(grade, 0)
            for document, grade in qrels[query].items()
        }
        ranked[str(place)] = {
            numbers.setdefault(document, str(len(numbers))): float(-rank)
            for rank, document in enumerate(documents)
        }
    at = ",".join(str(k) for k in cuts)
    evaluator = pytrec_eval.RelevanceEvaluator(grades, {f"{measure}.{at}" for measure in _MEASURES.values()})
    values = evaluator.evaluate(ranked)
    return {query: values[str(place)] for place, query in enumerate(hits)}


def _reciprocal_rank(grades: Mapping[str, int], documents: Iterable[str], k: int) -> float:
    for rank, document in enumerate(documents, 1):
        if rank > k:
            break
        if grades.get(document, 0) > 0:
            return 1.0 / rank
    return 0.0
