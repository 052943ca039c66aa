"""Re-rankers with a scoring of their own behind the routes: the scores of `CrossEncoder.predict`."""

import dataclasses

import folders
import httpx
import numpy as np
import pytest
from serving import DOCUMENTS, serve

from sgpt_jax.cross_encoder import CrossEncoder


@pytest.mark.parametrize(("name", "limit"), [("qwen3_reranker", 400), ("qwen3_classifier", 64)])
def test_scores_are_the_library_s(name, limit, models, tmp_path):
    model = CrossEncoder.from_pretrained(folders.write_folder(name, tmp_path / name), max_seq_length=limit)
    query, documents = folders.QUERIES[0], folders.DOCUMENTS
    expected = model.predict([(query, document) for document in documents])
    with (
        serve(dataclasses.replace(models, cross_encoder=model)) as (address, _),
        httpx.Client(base_url=address, timeout=60) as http,
    ):

        def rerank(**options):
            reply = http.post("/v1/rerank", json={"query": query, "documents": documents} | options).json()
            found = {result["index"]: result["relevance_score"] for result in reply["results"]}
            assert list(found.values()) == sorted(found.values(), reverse=True)
            return np.array([found[number] for number in range(len(documents))])

        np.testing.assert_allclose(rerank(raw_scores=True), expected, rtol=0, atol=1e-5)
        shares = rerank()
        assert (
            (np.argsort(shares) == np.argsort(expected)).all() and (shares > 0).all() and (shares < 1).all()
        )
        found = http.post("/search", json={"query": query, "k": 3, "rerank": 3}).json()["hits"]
        texts = {document.id: document.text for document in DOCUMENTS}
        alone = model.predict([(query, texts[hit["id"]]) for hit in found])
        np.testing.assert_allclose([hit["rerank_score"] for hit in found], alone, rtol=0, atol=1e-5)
        assert (np.diff(alone) <= 0).all()
        assert http.get("/info").json()["explains"] is False
        body = {"query": query, "texts": ["short", "long " * 500]}
        assert http.post("/rerank", json=body).headers["x-texts-cut"] == "1"
        assert http.post("/rerank", json=body | {"truncate": False}).status_code == 413
        wrong = http.post("/rerank", json={"query": query, "documents": documents, "return_tokens": True})
        assert wrong.status_code == 400 and wrong.json()["error"]["code"] == "no_log_probs"
