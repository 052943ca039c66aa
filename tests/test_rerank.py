"""Re-ranking a run: which pairs are scored, in which order, and what is refused."""

import decoders
import eval_cases
import pytest

from sgpt_jax import CrossEncoder
from sgpt_jax import rerank as rerank_module
from sgpt_jax.cross_encoder import NaNScoreError
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.metrics import cut
from sgpt_jax.rerank import rerank, texts_of
from sgpt_jax.runtime.progress import Progress

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


@pytest.mark.parametrize("reduction", ["sum", "search-endpoint"])
def test_the_bar_moves_with_every_batch(reduction, tmp_path, monkeypatch):
    """Within a part, by as many pairs as were done; equal pairs, which are computed once, count when the part ends."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint("llama", tmp_path / "model"))
    model = CrossEncoder.from_pretrained(folder, reduction=reduction)
    seen = []
    update = Progress.update

    def watched(bar, n=1):
        update(bar, n)
        if bar._what == "re-ranking":
            seen.append(bar.n)

    monkeypatch.setattr(Progress, "update", watched)
    monkeypatch.setattr(rerank_module, "part_pairs", lambda: 8)
    texts = {f"d{n}": f"heron {n // 2} " * (12 - n // 2) for n in range(12)}
    run = {"q": dict.fromkeys(texts, 1.0)}
    rerank(model, {"q": "a ferry"}, run, texts, batch_tokens=64)
    assert seen == sorted(seen) and seen[-1] == 12 and 8 in seen  # the ends of the parts
    assert len({n for n in seen if 0 < n < 8}) > 1
