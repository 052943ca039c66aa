"""Re-ranking a run: which pairs are scored, in which order, and what is refused."""

import eval_cases
import pytest

from sgpt_jax.cross_encoder import NaNScoreError
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.metrics import cut
from sgpt_jax.rerank import rerank, texts_of

DOCUMENTS = [
    Document("one", "The cats are running"),
    Document("two", "A cat runs; a CAT sleeps."),
    Document("three", "Nothing here"),
    Document("four", "cats cats cats dogs dogs and then some more words that make it long"),
]


def test_reranking_scores_the_best_documents_only():
    queries = {"q": "cats are", "r": "nothing"}
    first = {"q": {"one": 1.0, "two": 3.0, "three": 2.0}, "r": {"three": 1.0}}
    shallow, _ = cut(first, 2)
    texts = texts_of(shallow, DOCUMENTS)
    assert shallow == {"q": {"two": 3.0, "three": 2.0}, "r": {"three": 1.0}} and set(texts) == {
        "two",
        "three",
    }
    model = eval_cases.WordOverlap()
    run = rerank(model, queries, shallow, texts)
    assert {query: set(hits) for query, hits in run.items()} == {"q": {"two", "three"}, "r": {"three"}}
    # the longest document first; one document's queries stand side by side, so that they can share its pass
    assert [document for _, document in model.pairs] == [texts["two"], texts["three"], texts["three"]]


def test_reranking_refuses_unknown_documents_and_nan():
    with pytest.raises(
        InputError, match=r"document 'gone' that the corpus does not hold \('gone' for query 'q'\)"
    ):
        texts_of({"q": {"one": 2.0, "gone": 1.0}}, DOCUMENTS)

    class Broken:
        def predict(self, pairs, **options):
            raise NaNScoreError("NaN", 1)

    with pytest.raises(InputError, match="query 'q', document 'two' is NaN"):
        rerank(Broken(), {"q": "x"}, {"q": {"one": 1.0, "two": 2.0}}, {"one": "a", "two": "b"})
