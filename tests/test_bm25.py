"""BM25: Lucene's formula and analysis, trec_eval's ties."""

import math
import os
from pathlib import Path

import pytest

pytest.importorskip("bm25s", reason="the eval extra is not installed")

from sgpt_jax.bm25 import Bm25
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.corpora import Document
from sgpt_jax.metrics import evaluate

DOCUMENTS = [
    Document("one", "The cats are running"),
    Document("two", "A cat runs; a CAT sleeps."),
    Document("three", "Nothing here"),
    Document("four", "cats cats cats dogs dogs and then some more words that make it long"),
]


def test_bm25_is_lucenes_formula():
    """idf ln(1 + (N - n + 0.5) / (n + 0.5)) times tf / (tf + k1 (1 - b + b length / mean length)), stemmed."""
    run = Bm25(DOCUMENTS).search({"q": "cat run", "none": "zebra", "empty": "the of"}, 10)
    # words that are neither Lucene's stop words nor single letters
    lengths = {"one": 2, "two": 4, "three": 2, "four": 10}
    counts = {"one": (1, 1), "two": (2, 1), "four": (3, 0)}
    assert run["none"] == run["empty"] == {}
    mean = sum(lengths.values()) / 4
    for document, (cats, runs) in counts.items():
        norm = 0.9 * (1 - 0.4 + 0.4 * lengths[document] / mean)
        expected = sum(
            math.log(1 + (4 - n + 0.5) / (n + 0.5)) * tf / (tf + norm)
            for tf, n in ((cats, 3), (runs, 2))
            if tf
        )
        assert run["q"][document] == pytest.approx(expected, abs=1e-5), document
    assert set(run["q"]) == set(counts)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_bm25_ties_go_to_the_higher_id(k):
    documents = [Document(id, "same words") for id in ("b", "d", "a", "c")]
    assert list(Bm25(documents).candidates("words", k)) == ["d", "c", "b", "a"][:k]


def test_bm25_without_a_word_in_the_corpus():
    assert Bm25([Document("a", "!"), Document("b", "")]).search({"q": "cat"}, 5) == {"q": {}}


@pytest.mark.skipif("SGPT_DATA" not in os.environ, reason="SGPT_DATA is not set")
@pytest.mark.parametrize(
    ("name", "ndcg", "recall"), [("scifact", 0.671265, 0.918667), ("nfcorpus", 0.317328, 0.245525)]
)
def test_bm25_on_real_data(name, ndcg, recall):
    data = DataSet(name, Path(os.environ["SGPT_DATA"]) / name, "test").load()
    found = evaluate(data.qrels, Bm25(data.documents()).search(data.queries, 1000), queries=data.queries)
    assert found.metrics["ndcg@10"] == pytest.approx(ndcg, abs=1e-4)
    assert found.metrics["recall@100"] == pytest.approx(recall, abs=1e-4)
