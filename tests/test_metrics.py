"""Metrics: equal to pytrec_eval and to sentence-transformers' evaluator, with every rule around them."""

import json
import math

import eval_cases
import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")

import pytrec_eval

from sgpt_jax.errors import InputError
from sgpt_jax.metrics import CUTS, cut, evaluate, rank, trec_eval

MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}


def raw_pytrec(qrels, run, queries):
    """pytrec_eval's own values on the run as it is; means over the given queries, 0 for those without hits."""
    at = ",".join(map(str, CUTS))
    values = pytrec_eval.RelevanceEvaluator(qrels, {f"{m}.{at}" for m in MEASURES.values()}).evaluate(run)
    return {
        f"{name}@{k}": sum(values[q][f"{measure}_{k}"] for q in queries if q in values) / len(queries)
        for name, measure in MEASURES.items()
        for k in CUTS
    }


def without_own(run):
    return {query: {d: s for d, s in hits.items() if d != query} for query, hits in run.items()}


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_pytrec_eval(seed):
    qrels, run = eval_cases.hard_case(seed)
    found = evaluate(qrels, run)
    for name, value in raw_pytrec(qrels, run, list(qrels)).items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-6), name
    assert found.counts["queries"] == 12 and found.counts["queries_without_hits"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_identical_ids_are_dropped_before_the_cut(seed):
    qrels, run = eval_cases.hard_case(seed)
    found = evaluate(qrels, run, ignore_identical_ids=True)
    for name, value in raw_pytrec(qrels, without_own(run), list(qrels)).items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-6), name
    assert found.counts["identical_ids_dropped"] == 4
    kept, dropped = cut(run, 3, ignore_identical_ids=True)
    assert dropped == 4 and all(len(hits) == 3 for hits in kept.values())


def test_equal_to_sentence_transformers():
    qrels, run = eval_cases.hard_case()
    binary = {query: {d: int(grade > 0) for d, grade in part.items()} for query, part in qrels.items()}
    found = evaluate(binary, run, ignore_identical_ids=True)
    expected = json.loads((eval_cases.FIXTURES / "expected.json").read_text())["information_retrieval"]
    assert len(expected) == 26
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-6), name


def test_sentence_transformers_still_gives_the_fixture():
    module = pytest.importorskip(
        "sentence_transformers.sentence_transformer.evaluation",
        reason="sentence-transformers is not installed",
    )
    qrels, run = eval_cases.hard_case(7)
    documents = sorted({d for part in (*qrels.values(), *run.values()) for d in part}, reverse=True)
    renamed = {
        document: f"{place:06d}" for place, document in enumerate(documents)
    }  # its ties go the other way
    relevant = {q: {renamed[d] for d, grade in part.items() if grade > 0} for q, part in qrels.items()}
    evaluator = module.InformationRetrievalEvaluator(
        {q: q for q in qrels},
        {d: d for d in renamed.values()},
        relevant,
        ndcg_at_k=[10],
        mrr_at_k=[10],
        map_at_k=[100],
    )
    hits = [
        [{"corpus_id": renamed[d], "score": float(np.float32(s))} for d, s in run.get(q, {}).items()]
        for q in evaluator.queries_ids
    ]
    scores = evaluator.compute_metrics(hits)
    binary = {query: {d: int(grade > 0) for d, grade in part.items()} for query, part in qrels.items()}
    found = evaluate(binary, run).metrics
    assert found["ndcg@10"] == pytest.approx(scores["ndcg@k"][10], abs=1e-6)
    assert found["mrr@10"] == pytest.approx(scores["mrr@k"][10], abs=1e-6)
    assert found["map@100"] == pytest.approx(scores["map@k"][100], abs=1e-6)


def test_graded_gain_is_linear_and_negative_grades_gain_nothing():
    qrels = {"q": {"a": 3, "b": 1, "c": -2, "d": 0}}
    run = {"q": {"c": 4.0, "b": 3.0, "a": 2.0, "x": 1.0}}
    found = evaluate(qrels, run).metrics["ndcg@3"]
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert found == pytest.approx((1 / math.log2(3) + 3 / math.log2(4)) / ideal, abs=1e-9)


def test_trec_eval_takes_negative_grades_as_nothing():
    """pytrec_eval itself crashes on some of them."""
    qrels = {"q": {"a": -1, "b": 2, "c": -2}, "r": {"a": -1}}
    run = {"q": {"a": 3.0, "b": 2.0}, "r": {"a": 1.0}}
    found = trec_eval(qrels, run, ("map", "ndcg"))
    assert found["q"]["map"] == pytest.approx(0.5)
    assert found["q"]["ndcg"] == pytest.approx(1 / math.log2(3))
    assert found["r"]["map"] == found["r"]["ndcg"] == 0.0


def test_ties_rank_by_id_descending_in_float32():
    scores = {"a": 1.0, "b": 1.0 + 1e-12, "c": 1.0, "Z": 2.0, "é": 1.0}
    assert list(rank(scores, 10)) == ["Z", "é", "c", "b", "a"]
    assert list(rank(scores, 3)) == ["Z", "é", "c"]
    assert rank(scores)["b"] == 1.0 + 1e-12  # the score itself is kept as it was


def test_mrr_has_a_cut_of_its_own():
    qrels = {"q": {"a": 1}, "r": {"a": 1}}
    run = {"q": {"x": 3.0, "y": 2.0, "z": 1.5, "a": 1.0}, "r": {"a": 1.0}}
    found = evaluate(qrels, run).metrics
    assert found["mrr@1"] == 0.5 and found["mrr@3"] == 0.5 and found["mrr@5"] == (1 / 4 + 1) / 2


def test_means_are_over_judged_queries_that_the_queries_file_holds():
    qrels = {
        "found": {"a": 1},
        "missing": {"a": 1},
        "irrelevant": {"a": 0},
        "negative": {"a": -1},
        "elsewhere": {"a": 1},
    }
    run = {"found": {"a": 1.0}, "irrelevant": {"a": 1.0}, "negative": {"a": 1.0}, "unjudged": {"a": 1.0}}
    found = evaluate(qrels, run, queries=["found", "missing", "irrelevant", "negative", "unjudged"])
    assert found.metrics["ndcg@10"] == found.metrics["recall@10"] == found.metrics["mrr@10"] == 1 / 4
    assert found.queries == ["found", "missing", "irrelevant", "negative"]
    assert found.per_query["ndcg@10"] == [1.0, 0.0, 0.0, 0.0]
    assert found.counts == {
        "queries": 4,
        "queries_without_hits": 1,
        "queries_without_relevant": 2,
        "judged_queries_unknown": 1,
        "identical_ids_dropped": 0,
    }


def test_any_id_that_json_can_hold():
    ids = ["a\x00b", "a\x00c", "a b", "\u2028", "1", "01"]
    qrels = {"q\x00": {ids[0]: 1, ids[5]: 2}}
    run = {"q\x00": {id: float(score) for score, id in enumerate(ids)}}
    found = evaluate(qrels, run)
    assert (
        found.metrics["mrr@10"] == 1.0
        and found.metrics["recall@5"] == 0.5
        and found.metrics["recall@10"] == 1.0
    )


def test_cuts_beyond_the_run_invent_nothing():
    found = evaluate({"q": {"a": 1, "b": 1}}, {"q": {"a": 1.0}})
    assert found.metrics["recall@1000"] == 0.5 and found.metrics["precision@1000"] == 1 / 1000


def test_nan_is_refused_with_query_and_document():
    with pytest.raises(InputError, match="query 'q7', document 'd3' is NaN"):
        evaluate({"q7": {"a": 1}}, {"q7": {"a": 1.0, "d3": float("nan")}})


def test_nothing_to_measure_is_an_error():
    for qrels, queries in (({"q": {"a": 1}}, ["other"]), ({}, ["q"]), ({"q": {}}, ["q"])):
        with pytest.raises(InputError, match="nothing to measure"):
            evaluate(qrels, {"q": {"a": 1.0}}, queries=queries)


def test_a_cut_run_measures_the_same():
    qrels, run = eval_cases.hard_case(2)
    whole, shallow = evaluate(qrels, run), evaluate(qrels, cut(run, 10)[0])
    assert all(
        whole.metrics[f"{name}@{k}"] == shallow.metrics[f"{name}@{k}"]
        for name in MEASURES
        for k in (1, 3, 5, 10)
    )
