"""Exact search of a streamed corpus, BM25, and re-ranking: the run is what a full sort would give."""

import math
import os
from pathlib import Path

import eval_cases
import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("bm25s", reason="the eval extra is not installed")

from eval import bm25
from eval.data import DataSet
from eval.metrics import evaluate
from eval.rerank import candidates, rerank
from eval.search import search
from sgpt_jax.cross_encoder import NaNScoreError
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document


class Vectors(eval_cases.HashEncoder):
    """Texts that are vectors: "1 0 2" is [1, 0, 2]."""

    def encode(self, texts, **options):
        self.sizes.append(len(texts))
        return np.array([[float(number) for number in text.split()] for text in texts], np.float32)

    encode_query = encode_document = encode


def full_sort(queries, documents, k):
    """The same by numpy in float32, with trec_eval's order."""

    def unit(text):
        vector = np.array([float(number) for number in text.split()], np.float32)
        return vector / np.linalg.norm(vector)

    run = {}
    for query, text in queries.items():
        scores = {document.id: float(unit(text) @ unit(document.text)) for document in documents}
        best = sorted(scores.items(), key=lambda hit: (round(hit[1], 5), hit[0]), reverse=True)[:k]
        run[query] = dict(best)
    return run


def made_up(count=60):
    """Documents of few different directions, so that most scores are tied, also at any cut."""
    random = np.random.RandomState(1)
    # Along the axes, with lengths that divide exactly, so that equal cosines are equal to the last bit.
    vectors = np.eye(3, dtype=int)[random.randint(0, 3, count)] * random.choice([-2, -1, 1, 4], (count, 1))
    ids = [f"{number:02d}" for number in random.permutation(count)]
    documents = [Document(id, " ".join(map(str, vector))) for id, vector in zip(ids, vectors, strict=True)]
    return {"a": "1 0 0", "b": "1 1 0", "c": "-1 2 3"}, documents


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
@pytest.mark.parametrize("k", [1, 5, 59, 100])
def test_ties_at_the_cut_and_across_chunks(chunk, k):
    queries, documents = made_up()
    model = Vectors()
    run = search(model, queries, iter(documents), k, chunk=chunk)
    expected = full_sort(queries, documents, k)
    for query in queries:
        assert list(run[query]) == list(expected[query])
        assert list(run[query].values()) == pytest.approx(list(expected[query].values()), abs=1e-6)
    assert max(model.sizes[1:]) <= chunk  # after the queries, never more than a chunk of documents at a time


def test_corpus_is_taken_as_a_stream():
    queries, documents = made_up()
    taken = []

    class Watching(Vectors):
        def encode_document(self, texts, **options):
            taken.append(handed_out)
            return self.encode(texts)

    handed_out = 0

    def stream():
        nonlocal handed_out
        for document in documents:
            handed_out += 1
            yield document

    search(Watching(), queries, stream(), 5, chunk=20)
    assert taken == [20, 40, 60]


def test_a_zero_vector_is_like_nothing():
    run = search(Vectors(), {"q": "0 0"}, [Document("a", "1 0"), Document("b", "0 0")], 2)
    assert run == {"q": {"b": 0.0, "a": 0.0}}


def test_vectors_that_are_not_finite_are_named():
    with pytest.raises(InputError, match="document 'bad' is not finite"):
        search(Vectors(), {"q": "1 0"}, [Document("a", "1 0"), Document("bad", "nan 0")], 2)
    with pytest.raises(InputError, match="query 'q' is not finite"):
        search(Vectors(), {"q": "inf 0"}, [Document("a", "1 0")], 2)


DOCUMENTS = [
    Document("one", "The cats are running"),
    Document("two", "A cat runs; a CAT sleeps."),
    Document("three", "Nothing here"),
    Document("four", "cats cats cats dogs dogs and then some more words that make it long"),
]


def test_bm25_is_lucenes_formula():
    """idf ln(1 + (N - n + 0.5) / (n + 0.5)) times tf / (tf + k1 (1 - b + b length / mean length)), stemmed."""
    run = bm25.search({"q": "cat run", "none": "zebra", "empty": "the of"}, DOCUMENTS, 10)
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
    assert list(bm25.search({"q": "words"}, documents, k)["q"]) == ["d", "c", "b", "a"][:k]


def test_bm25_without_a_word_in_the_corpus():
    assert bm25.search({"q": "cat"}, [Document("a", "!"), Document("b", "")], 5) == {"q": {}}


@pytest.mark.skipif("SGPT_DATA" not in os.environ, reason="SGPT_DATA is not set")
@pytest.mark.parametrize(
    ("name", "ndcg", "recall"), [("scifact", 0.671265, 0.918667), ("nfcorpus", 0.317328, 0.245525)]
)
def test_bm25_on_real_data(name, ndcg, recall):
    data = DataSet(name, Path(os.environ["SGPT_DATA"]) / name, "test").load()
    found = evaluate(data.qrels, bm25.search(data.queries, data.documents(), 1000), queries=data.queries)
    assert found.metrics["ndcg@10"] == pytest.approx(ndcg, abs=1e-4)
    assert found.metrics["recall@100"] == pytest.approx(recall, abs=1e-4)


def test_reranking_scores_the_best_documents_only():
    queries = {"q": "cats are", "r": "nothing"}
    first = {"q": {"one": 1.0, "two": 3.0, "three": 2.0}, "r": {"three": 1.0}}
    shallow, texts = candidates(first, DOCUMENTS, 2)
    assert shallow == {"q": {"two": 3.0, "three": 2.0}, "r": {"three": 1.0}} and set(texts) == {
        "two",
        "three",
    }
    model = eval_cases.WordOverlap()
    run = rerank(model, queries, shallow, texts)
    assert {query: set(hits) for query, hits in run.items()} == {"q": {"two", "three"}, "r": {"three"}}
    # one document's queries stand side by side, so that they can share its pass
    assert [document for _, document in model.pairs] == [texts["three"], texts["three"], texts["two"]]


def test_reranking_refuses_unknown_documents_and_nan():
    with pytest.raises(InputError, match="ranks 'gone' for query 'q'"):
        candidates({"q": {"one": 2.0, "gone": 1.0}}, DOCUMENTS, 2)

    class Broken:
        def predict(self, pairs, **options):
            raise NaNScoreError("NaN", 1)

    with pytest.raises(InputError, match="query 'q', document 'two' is NaN"):
        rerank(Broken(), {"q": "x"}, {"q": {"one": 1.0, "two": 2.0}}, {"one": "a", "two": "b"})
