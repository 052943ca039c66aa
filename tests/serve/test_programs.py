"""What the device computes for a server, beside what the library gives for the same texts; also on a mesh."""

import asyncio
import warnings

import folders
import numpy as np
import pytest
import serving
from devices import run_on_eight

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.serve.programs import Embedder, Scorer, Searcher, TokenPair, TokenText, Wanted
from sgpt_jax.serve.service import Models, Service
from sgpt_jax.text.pairs import Prompt, query_tokens, tokenise_pairs

WORDS = "heron ferry market bay water night shallow day people stay twice crosses waits three on".split()  # noqa: SIM905


def sentences(count, longest, seed=0):
    random = np.random.RandomState(seed)
    return [" ".join(random.choice(WORDS, random.randint(1, longest))) for _ in range(count)]


def everything(lane, items, sizes):
    """The results of all items, in batches as the worker makes them."""
    for _ in lane.compile():
        pass
    waiting, results = list(range(len(items))), [None] * len(items)
    while waiting:
        plan = lane.plan([sizes[item] for item in waiting])
        taken = [waiting[place] for place in plan.texts]
        for item, result in zip(taken, lane.start([items[item] for item in waiting], plan)(), strict=True):
            results[item] = result
        waiting = [item for item in waiting if item not in taken]
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return serving.tiny_models(tmp_path_factory.mktemp("programs"))


def test_vectors(models):
    texts = sentences(70, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = models.encoder.text.ids(texts, "query")
        wanted = models.encoder.encode_query(texts)
    found = everything(Embedder(models.encoder), [*map(TokenText, ids)], [len(row) for row in ids])
    np.testing.assert_allclose(np.stack(found), wanted, rtol=1e-5, atol=2e-6)


def test_prompts_that_are_not_pooled(tmp_path):
    """Queries and documents of a batch each leave out as many tokens as their own prompt has."""
    model = BiEncoder.from_pretrained(folders.write_folder("pooling_all", tmp_path), max_seq_length=24)
    service = Service(1 << 18)
    service.load(Models(model))
    texts = sentences(5, 3)

    async def ask():
        asked = [service.embed(texts, side, "me", param="input") for side in ("query", "document")]
        return [found.vectors for found in await asyncio.gather(*asked)]

    queries, documents = asyncio.run(ask())
    assert service.close(10)
    np.testing.assert_allclose(queries, model.encode_query(texts), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(documents, model.encode_document(texts), rtol=1e-4, atol=1e-5)


def test_log_probs(models):
    model = models.cross_encoder
    pairs = list(zip(sentences(30, 4, 1), sentences(30, 9, 2), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = model.predict(pairs)
    tokens = tokenise_pairs(model.text, model.prompt, *zip(*pairs, strict=True))
    items = [TokenPair(tokens.contexts[context], tokens.queries[query]) for context, query in tokens.pairs]
    found = everything(Scorer(model), items, [item.size for item in items])
    sums = np.array([values.sum(dtype=np.float64) for values in found])
    np.testing.assert_allclose(sums[tokens.indices], wanted, rtol=1e-5)
    for (query, document), place in zip(pairs, tokens.indices, strict=True):
        pieces, values = model.token_log_probs(query, document)
        assert "".join(pieces) == query
        np.testing.assert_allclose(values, found[place], rtol=1e-4, atol=1e-5)


def test_searches(models):
    vectors = np.random.RandomState(0).standard_normal((9, 32)).astype(np.float32)
    items = [Wanted(vector, 1 + number % 4) for number, vector in enumerate(vectors)]
    found = everything(Searcher(models.index), items, [1] * 9)
    scores, rows = models.index.search(vectors, 3)
    for item, hits, wanted, row in zip(items, found, scores, rows, strict=True):
        k = min(3, item.k)
        assert [hit.id for hit in hits] == models.index.ids(row[:k])
        assert [hit.text for hit in hits] == models.index.texts(row[:k])
        np.testing.assert_allclose([hit.score for hit in hits], wanted[:k], atol=1e-6)


@pytest.mark.parametrize(
    "query", ["", " ", "heron", "  two  blanks ", "ßpaß 😀😀", "a\nb", "\ud83d\ude00", "\ud83d"]
)
def test_tokens_of_a_query_are_its_pieces(models, query):
    model = models.cross_encoder
    pieces, values = model.token_log_probs(query, "The heron waits.")
    assert len(pieces) == len(values)
    assert "".join(pieces) == query.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert values.dtype == np.float32
    if query:
        np.testing.assert_allclose(values.sum(), model.predict([(query, "The heron waits.")])[0], rtol=1e-5)


def test_pieces_end_where_a_long_query_is_cut(models):
    model = models.cross_encoder
    query = "heron " * 60
    pieces, values = model.token_log_probs(query, "")
    assert len(pieces) == len(values) < len(model.text.plain_ids([query])[0])
    assert query.startswith("".join(pieces))
    started = Prompt("Doc: ", " Query:", " ")
    assert "".join(query_tokens(model.text, started, "heron")) == " heron"
    with pytest.raises(TypeError):
        model.token_log_probs(1, "a")


def test_a_mesh_gives_the_same(models, tmp_path):
    texts = sentences(20, 5)
    documents, query = sentences(11, 5, 3), "the heron waits"
    np.savez(
        tmp_path / "wanted.npz",
        vectors=models.encoder.encode_document(texts),
        scores=models.cross_encoder.predict([(query, document) for document in documents]),
    )
    code = """
        import sys
        import numpy as np
        import serving
        from sgpt_jax import make_mesh
        sys.path.insert(0, "tests/serve")
        from test_programs import everything
        from sgpt_jax.serve.programs import Embedder, Scorer, TokenPair, TokenText
        from sgpt_jax.text.pairs import tokenise_pairs
        from pathlib import Path

        texts, documents, query = eval(sys.argv[2])
        models = serving.tiny_models(Path(sys.argv[1]), mesh=make_mesh("data=2,fsdp=2,tensor=2"))
        ids = models.encoder.text.ids(texts, "document")
        embedder = Embedder(models.encoder)
        assert all(shape.rows % 4 == 0 for shape in embedder.shapes)
        vectors = everything(embedder, [*map(TokenText, ids)], [len(row) for row in ids])
        model = models.cross_encoder
        tokens = tokenise_pairs(model.text, model.prompt, [query] * len(documents), documents)
        items = [TokenPair(tokens.contexts[c], tokens.queries[q]) for c, q in tokens.pairs]
        found = everything(Scorer(model), items, [item.size for item in items])
        with np.load(sys.argv[1] + "/wanted.npz") as wanted:
            np.testing.assert_allclose(np.stack(vectors), wanted["vectors"], rtol=1e-4, atol=1e-5)
            scores = np.array([values.sum() for values in found])[tokens.indices]
            np.testing.assert_allclose(scores, wanted["scores"], rtol=1e-4)
    """
    run_on_eight(code, tmp_path, repr((texts, documents, query)))
