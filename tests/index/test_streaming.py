"""Exact search of a corpus that streams by: the run is what a full sort would give."""

import eval_cases
import numpy as np
import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.streaming import search_corpus


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
    run = search_corpus(model, queries, iter(documents), k, chunk=chunk)
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

    search_corpus(Watching(), queries, stream(), 5, chunk=20)
    assert taken == [20, 40, 60]


def test_a_zero_vector_is_like_nothing():
    run = search_corpus(Vectors(), {"q": "0 0"}, [Document("a", "1 0"), Document("b", "0 0")], 2)
    assert run == {"q": {"b": 0.0, "a": 0.0}}


def test_vectors_that_are_not_finite_are_named():
    with pytest.raises(InputError, match="document 'bad' is not finite"):
        search_corpus(Vectors(), {"q": "1 0"}, [Document("a", "1 0"), Document("bad", "nan 0")], 2)
    with pytest.raises(InputError, match="query 'q' is not finite"):
        search_corpus(Vectors(), {"q": "inf 0"}, [Document("a", "1 0")], 2)


def test_the_similarity_is_the_models():
    """By dot product the longer document wins, by cosine the nearer one; distances are refused by name."""
    documents = [Document("long", "9 3"), Document("near", "1 0")]
    runs = {
        name: search_corpus(Vectors(similarity_name=name), {"q": "2 0"}, documents, 2)["q"]
        for name in ("cosine", "dot")
    }
    assert list(runs["cosine"]) == ["near", "long"]
    assert runs["dot"] == {"long": 18.0, "near": 2.0}
    with pytest.raises(InputError, match="by manhattan distance"):
        search_corpus(Vectors(similarity_name="manhattan"), {"q": "2 0"}, documents, 2)
