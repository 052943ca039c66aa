"""The one order of documents, and the retrieval metrics: those of pytrec_eval, with the rules around them.

Scores are compared as float32 and ties rank by document id, descending, as in trec_eval. The gain is max(grade, 0),
linear; the ideal list comes from all judged documents. Means are over every judged query that the queries file holds:
one without hits counts 0, and so does one without any relevant document (BEIR and mteb).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sgpt_jax.errors import InputError

CUTS = (1, 3, 5, 10, 100, 1000)
_MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Evaluation:
    """Means, values per query and counts of one run.

    ``metrics`` and ``per_query`` have keys such as ``ndcg@10``; the values of ``per_query`` are in the order of
    ``queries``.
    """

    metrics: dict[str, float]
    queries: list[str]
    per_query: dict[str, list[float]]
    counts: dict[str, int] = field(default_factory=dict)


def rank(
    scores: Mapping[str, float], k: int | None = None, *, query: str | None = None, ignore: str | None = None
) -> dict[str, float]:
    """The best k documents in trec_eval's order: float32 score, then id as a string, both descending.

    Args:
        scores: {document id: score}; infinities are legal.
        k: how many to keep; None keeps all of them, and so do more than there are.
        query: the query's id, for messages.
        ignore: a document id that is dropped before the cut.

    Returns:
        {document id: score}, best first, with the scores as they were given.

    Raises:
        InputError: a NaN score, with query and document id.
    """
    with np.errstate(over="ignore"):  # beyond float32 means infinity there, as in trec_eval
        rounded = np.fromiter(scores.values(), np.float64, len(scores)).astype(np.float32).tolist()
    entries = []
    for document, score in zip(scores, rounded, strict=True):
        if math.isnan(score):
            whose = "" if query is None else f"query {query!r}, "
            raise InputError(f"the score of {whose}document {document!r} is NaN")
        if document != ignore:
            entries.append((score, document))
    best = sorted(entries, reverse=True) if k is None or len(entries) <= k else heapq.nlargest(k, entries)
    return {document: scores[document] for _, document in best}


def cut(
    run: Run, k: int | None, *, ignore_identical_ids: bool = False
) -> tuple[dict[str, dict[str, float]], int]:
    """Every query's best k documents in rank order, and how many with the query's own id were dropped.

    The drop comes before the cut, so k documents remain where there are that many others.
    """
    kept, dropped = {}, 0
    for query, scores in run.items():
        own = query if ignore_identical_ids else None
        dropped += own is not None and own in scores
        kept[query] = rank(scores, k, query=query, ignore=own)
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
    values = trec_eval(qrels, hits, [f"{measure}.{k}" for measure in _MEASURES.values() for k in cuts])
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


def trec_eval(qrels: Qrels, run: Run, measures: Iterable[str]) -> dict[str, dict[str, float]]:
    """trec_eval's own values for every query of a run whose documents are in rank order, through pytrec_eval.

    It is given ranks for scores and numbers for ids: the order is settled already, and C strings cannot hold every id
    that JSON can. Negative grades gain nothing (pytrec_eval itself crashes on some).

    Args:
        qrels: {query id: {document id: grade}}, for every query of the run.
        run: {query id: {document id: score}}, best first; the scores are not looked at.
        measures: pytrec_eval's names, such as "map" or "ndcg_cut.10".

    Returns:
        {query id: {measure: value}}, with pytrec_eval's names of values, such as "ndcg_cut_10".

    Raises:
        InputError: pytrec_eval is not installed.
    """
    try:
        import pytrec_eval
    except ModuleNotFoundError as error:
        raise InputError(f"retrieval metrics need {error.name}: pip install 'sgpt-jax[eval]'") from error
    grades, ranked = {}, {}
    for number, (query, documents) in enumerate(run.items()):
        aliases: dict[str, str] = {}
        grades[str(number)] = {
            aliases.setdefault(document, str(len(aliases))): max(grade, 0)
            for document, grade in qrels[query].items()
        }
        ranked[str(number)] = {
            aliases.setdefault(document, str(len(aliases))): float(-position)
            for position, document in enumerate(documents)
        }
    values = pytrec_eval.RelevanceEvaluator(grades, set(measures)).evaluate(ranked)
    return {query: values[str(position)] for position, query in enumerate(run) if str(position) in values}


def _reciprocal_rank(grades: Mapping[str, int], documents: Iterable[str], k: int) -> float:
    for rank, document in enumerate(documents, 1):
        if rank > k:
            break
        if grades.get(document, 0) > 0:
            return 1.0 / rank
    return 0.0
