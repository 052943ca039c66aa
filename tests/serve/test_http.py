"""The routes as their clients use them: OpenAI's own client, Cohere's and TEI's requests, search, limits, faults."""

import base64
import concurrent.futures
import dataclasses
import time
import warnings

import decoders
import httpx
import numpy as np
import pytest
from serving import DOCUMENTS, listening_with, serve

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.serve.batching import Job
from sgpt_jax.serve.http import Limits
from sgpt_jax.serve.programs import TokenText
from sgpt_jax.serve.service import Models

openai = pytest.importorskip("openai", reason="needs OpenAI's client")

TEXTS = ["The heron waits.", "", "The ferry crosses the bay twice a day. " * 5, "ßpaß 😀", "heron"]
# Matrix products round differently with the shape of the batch that a text happens to be in.
SAME = {"rtol": 0, "atol": 1e-6}


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live[0]}/v1", api_key="none") as found:
        yield found


def encoded(models, texts, side="document"):
    encode = models.encoder.encode_query if side == "query" else models.encoder.encode_document
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode(texts, normalize=True)


def vectors(reply):
    return np.array([entry.embedding for entry in reply.data], np.float32)


def test_openai_client_gets_the_library_s_vectors(client, models):
    # Without a format, the client asks for base64 and decodes it.
    reply = client.embeddings.create(model="tiny", input=TEXTS)
    np.testing.assert_allclose(vectors(reply), encoded(models, TEXTS), **SAME)
    assert [entry.index for entry in reply.data] == list(range(len(TEXTS)))
    sizes = [len(ids) for ids in models.encoder.text.ids(TEXTS, "document", on_cut=lambda count: None)]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(sizes)
    floats = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    np.testing.assert_allclose(vectors(floats), vectors(reply), **SAME)
    (coded,) = client.embeddings.create(model="tiny", input="heron", encoding_format="base64").data
    decoded = np.frombuffer(base64.b64decode(coded.embedding), "<f4")
    np.testing.assert_allclose(decoded, vectors(reply)[4], **SAME)


def test_queries_and_documents(client, models):
    for side in ("query", "document"):
        reply = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"input_type": side})
        np.testing.assert_allclose(vectors(reply), encoded(models, TEXTS, side), **SAME)


def test_token_ids_are_texts(client, models):
    ids = [row or [models.encoder.text.eos_id] for row in models.encoder.text.plain_ids(TEXTS)]
    wanted = encoded(models, TEXTS)
    reply = vectors(client.embeddings.create(model="tiny", input=[ids[0], ids[2], ids[4]]))
    np.testing.assert_allclose(reply, wanted[[0, 2, 4]], **SAME)
    np.testing.assert_allclose(
        vectors(client.embeddings.create(model="tiny", input=ids[4])), wanted[4:], **SAME
    )


@pytest.mark.parametrize("brackets", [True, False])
def test_ids_of_the_tokenizer_are_texts_with_their_own_brackets(brackets, tmp_path):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("llama", tmp_path / "tiny"), bos=True)
    encoder = BiEncoder.from_pretrained(folder, brackets=brackets, max_seq_length=40)
    texts = ['{"a": 1}', "f() { x }", "[12] see", "[]", "{", ""]
    with serve(Models(encoder)) as (address, _):
        for special in (True, False):  # with the tokenizer's BOS, and without
            ids = [encoder.text.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
            ids = [row for row in ids if row]  # an empty list is no text
            for side in ("document", "query"):
                reply = httpx.post(f"{address}/embed", json={"inputs": ids, "prompt_name": side}).json()
                wanted = encoded(Models(encoder), texts[: len(ids)], side)
                np.testing.assert_allclose(np.array(reply, np.float32), wanted, **SAME)


def test_dimensions_are_cut_and_normalised(client, models):
    reply = vectors(client.embeddings.create(model="tiny", input="heron", dimensions=5))
    wanted = encoded(models, ["heron"])[:, :5]
    np.testing.assert_allclose(reply, wanted / np.linalg.norm(wanted), **SAME)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [["a"]]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [5, 100000]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 33}, "dimensions"),
        ({"input": "a", "dimensions": "4"}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "input_type": "title"}, "input_type"),
    ],
)
def test_wrong_requests_name_the_field(client, body, param):
    rest = {name: value for name, value in body.items() if name != "input"}
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model="tiny", input=body["input"], extra_body=rest)
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")


def test_errors_are_the_client_s_classes(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as error:
        client.embeddings.create(model="tiny", input=["heron " * 30] * 60)
    assert error.value.status_code == 413
    assert error.value.request_id


def test_a_wrong_key_is_the_client_s_error(live):
    with listening_with(live[1], Limits(api_key="secret")) as address:
        for key, error in (("wrong", openai.AuthenticationError), ("secret", None)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
                if error is None:
                    assert client.embeddings.create(model="tiny", input="a").data
                    continue
                with pytest.raises(error):
                    client.embeddings.create(model="tiny", input="a")


def test_keys_beyond_ascii_come_in_both_encodings(live):
    key = "clé à"  # whose last byte of UTF-8 is a space of Latin-1
    with listening_with(live[1], Limits(api_key=key)) as address:
        for code in ("utf-8", "latin-1"):
            for sent, status in ((key, 200), (key + "é", 401)):
                headers = {b"authorization": f"Bearer {sent}".encode(code)}
                assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("route", "body", "status", "param"),
    [
        ("/rerank", {"query": "a", "texts": ["a"], "documents": ["b"]}, 400, "texts"),
        (
            "/rerank",
            {"query": "a", "texts": ["a"], "truncation_direction": "Left"},
            400,
            "truncation_direction",
        ),
        ("/embed", {"inputs": "a", "truncation_direction": "left"}, 400, "truncation_direction"),
        ("/embed", {"inputs": "a", "truncation_direction": "right"}, 200, None),
        ("/search", {"query": "a", "model": "gpt-4"}, 404, "model"),
        ("/search", {"query": "a", "model": "tiny"}, 200, None),
    ],
)
def test_what_is_not_done_is_refused(http, route, body, status, param):
    reply = http.post(route, json=body)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]["param"] == param


def test_429_is_tried_again_and_succeeds(live, client, models, blocked):
    _, service = live
    waiting = Job("embed", "other", [TokenText([1] * 30)] * 66, [30] * 66)
    service.queue.put(waiting)
    with pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=0).embeddings.create(model="tiny", input=["heron " * 15])
    calls = []

    def record(response):
        calls.append(response.status_code)
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            blocked.append(True)

    again = openai.DefaultHttpxClient(event_hooks={"response": [record]})
    with openai.OpenAI(base_url=f"{live[0]}/v1", api_key="none", http_client=again) as retrying:
        reply = retrying.embeddings.create(model="tiny", input=["heron " * 15])
    assert calls == [429, 200]
    np.testing.assert_allclose(vectors(reply), encoded(models, ["heron " * 15]), **SAME)
    assert len(waiting.future.result(20)) == 66
    assert service.queue.most_tokens <= service.queue.bound


def test_reranking_as_cohere_jina_and_vllm_ask(http, models):
    documents = ["The ferry crosses.", "The heron waits.", "heron"]
    scores = models.cross_encoder.predict([("heron", document) for document in documents])
    order = np.argsort(-scores)
    for route in ("/v1/rerank", "/v2/rerank", "/rerank"):
        body = {"model": "tiny", "query": "heron", "documents": documents}
        reply = http.post(route, json=body).json()
        assert [result["index"] for result in reply["results"]] == order.tolist()
        relevance = [result["relevance_score"] for result in reply["results"]]
        length = len(models.cross_encoder.text.plain_ids(["heron"])[0])
        np.testing.assert_allclose(relevance, np.exp(scores[order] / length), rtol=1e-5)
        assert "document" not in reply["results"][0]
        assert reply["meta"]["billed_units"]["search_units"] == 1
        assert reply["usage"]["total_tokens"] > 0
    body |= {"documents": [{"text": text} for text in documents], "return_documents": True}
    body |= {"top_n": 2, "raw_scores": True, "return_tokens": True}
    results = http.post("/v1/rerank", json=body).json()["results"]
    assert [result["document"]["text"] for result in results] == [documents[i] for i in order[:2]]
    np.testing.assert_allclose([r["relevance_score"] for r in results], scores[order[:2]], rtol=1e-5)
    for result in results:
        assert "".join(token["text"] for token in result["tokens"]) == "heron"
        total = sum(token["log_prob"] for token in result["tokens"])
        np.testing.assert_allclose(total, result["relevance_score"], rtol=1e-5)
    raw = http.post("/v1/rerank", json={"query": "heron", "documents": documents, "use_activation": False})
    assert raw.json()["results"][0]["relevance_score"] == results[0]["relevance_score"]
    everything = http.post("/v1/rerank", json={"query": "heron", "documents": documents, "top_n": 0})
    assert len(everything.json()["results"]) == 3


def test_reranking_reads_the_beginning_of_documents_on_demand(http):
    def scores(**options):
        body = {"query": "heron", "documents": ["The heron waits in the water."], "raw_scores": True}
        return http.post("/rerank", json=body | options).json()["results"][0]["relevance_score"]

    assert scores() == scores(max_tokens_per_doc=1000)
    short = {"documents": ["The heron"]}
    tokens = 1
    while scores(max_tokens_per_doc=tokens) != scores(**short):
        tokens += 1
        assert tokens < 12


def test_odd_queries_and_documents(http):
    body = {"query": "", "documents": ["a", ""], "raw_scores": True}
    assert [r["relevance_score"] for r in http.post("/rerank", json=body).json()["results"]] == [0, 0]
    body = {"query": "heron ß😀", "documents": ["a", "", "word " * 500], "return_tokens": True}
    results = http.post("/rerank", json=body).json()["results"]
    assert len(results) == 3
    assert all("".join(token["text"] for token in r["tokens"]) == "heron ß😀" for r in results)
    for body in ({"documents": ["a"]}, {"query": "a", "documents": []}, {"query": "a", "documents": [1]}):
        assert http.post("/rerank", json=body).status_code == 400
    assert http.post("/rerank", json={"query": "a", "documents": ["a"] * 1001}).status_code == 400


def test_tei(http, models):
    reply = http.post("/embed", json={"inputs": TEXTS})
    np.testing.assert_allclose(np.array(reply.json(), np.float32), encoded(models, TEXTS), **SAME)
    assert reply.headers["x-texts-cut"] == "1"
    one = http.post("/embed", json={"inputs": "heron", "prompt_name": "query", "normalize": False})
    wanted = models.encoder.encode_query(["heron"])
    np.testing.assert_allclose(np.array(one.json(), np.float32), wanted, rtol=1e-5, atol=1e-6)
    assert http.post("/embed", json={"inputs": TEXTS, "truncate": False}).status_code == 413
    assert http.post("/v1/embeddings", json={"input": TEXTS, "truncate": False}).status_code == 413
    assert http.post("/embed", json={"inputs": ["heron"], "truncate": False}).status_code == 200
    body = {
        "query": "heron",
        "texts": ["The ferry crosses.", "heron"],
        "raw_scores": True,
        "return_text": True,
    }
    reply = http.post("/rerank", json=body).json()
    scores = models.cross_encoder.predict([("heron", text) for text in body["texts"]])
    for result in reply:
        assert result["text"] == body["texts"][result["index"]]
        np.testing.assert_allclose(result["score"], scores[result["index"]], rtol=1e-5)
    info = http.get("/info").json()
    assert (info["model_id"], info["max_input_length"], info["documents"]) == ("tiny", 40, 3)


def test_texts_that_are_cut_for_reranking_are_counted_or_refused(http):
    long = "heron " * 200
    for query, documents, cut in (
        ("heron", ["ferry", "bay"], None),
        ("heron", [long, "ferry", long + "!"], "2"),
        (long, ["ferry"], "2"),  # which leaves no room for the document
    ):
        for field in ("texts", "documents"):
            body = {"query": query, field: documents}
            reply = http.post("/rerank", json=body)
            assert (reply.status_code, reply.headers.get("x-texts-cut")) == (200, cut)
            reply = http.post("/rerank", json=body | {"truncate": False})
            assert reply.status_code == (413 if cut else 200)
            if cut:
                error = reply.json()["error"]
                assert (error["code"], error["param"]) == ("text_too_long", field)
                assert error["message"].startswith(f"{cut} texts are too long: 96 tokens")
    # What is asked for is not cut.
    body = {"query": "heron", "documents": [long], "max_tokens_per_doc": 4, "truncate": False}
    reply = http.post("/rerank", json=body)
    assert reply.status_code == 200 and "x-texts-cut" not in reply.headers
    assert http.post("/rerank", json=body | {"truncate": "no"}).status_code == 400


def test_texts_that_are_cut_for_a_search_are_counted(http):
    for body, cut in (
        ({"query": "heron"}, None),
        ({"query": "heron " * 60}, "1"),  # more than the encoder's 40 tokens
        ({"query": "heron", "rerank": 3}, "1"),  # d2, see the next test
        ({"query": "heron " * 200, "rerank": 3}, "4"),  # the query once
    ):
        reply = http.post("/search", json=body)
        assert (reply.status_code, reply.headers.get("x-texts-cut")) == (200, cut)


def test_search(http, models):
    body = {"query": "the heron waits", "k": 2, "return_documents": True}
    reply = http.post("/search", json=body).json()
    vector = models.encoder.encode_query(["the heron waits"])
    scores, rows = models.index.search(vector, 2)
    assert [hit["id"] for hit in reply["hits"]] == models.index.ids(rows[0])
    assert [hit["text"] for hit in reply["hits"]] == models.index.texts(rows[0])
    np.testing.assert_allclose([hit["score"] for hit in reply["hits"]], scores[0], atol=1e-6)
    assert reply["documents"] == 3
    again = http.post("/search", json={"vector": vector[0].tolist(), "k": 2}).json()
    assert [hit["id"] for hit in again["hits"]] == [hit["id"] for hit in reply["hits"]]


def test_search_with_reranking_and_tokens(http, models):
    body = {"query": "the heron waits", "rerank": 3, "return_tokens": True}
    hits = http.post("/search", json=body).json()["hits"]
    texts = {document.id: document.text for document in DOCUMENTS}
    pairs = [("the heron waits", texts[hit["id"]]) for hit in hits]
    np.testing.assert_allclose(
        [hit["rerank_score"] for hit in hits], models.cross_encoder.predict(pairs), rtol=1e-5
    )
    assert [hit["rerank_score"] for hit in hits] == sorted((h["rerank_score"] for h in hits), reverse=True)
    for hit in hits:
        assert "".join(token["text"] for token in hit["tokens"]) == "the heron waits"
        assert hit["title"] and hit["snippet"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "query"),
        ({"query": "a", "vector": [1.0] * 32}, "query"),
        ({"vector": [1.0] * 31}, "vector"),
        ({"vector": ["a"] * 32}, "vector"),
        ({"vector": [1e39] * 32}, "vector"),
        ({"vector": [1.0] * 32, "rerank": 3}, "vector"),
        ({"query": "a", "k": 0}, "k"),
        ({"query": "a", "k": 1025}, "k"),
        ({"query": "a", "k": 5, "rerank": 3}, "k"),
        ({"query": 1}, "query"),
        ({"query": "a", "return_tokens": 1}, "return_tokens"),
        ({"query": "a", "hybrid": True}, "hybrid"),
        ({"query": "a", "top_k": 3}, "top_k"),
    ],
)
def test_wrong_searches_name_the_field(http, body, param):
    reply = http.post("/search", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_what_is_not_served_says_how(models):
    with serve(dataclasses.replace(models, cross_encoder=None, index=None)) as (address, _):
        for route, body in (
            ("/search", {"query": "a"}),
            ("/rerank", {"query": "a", "documents": ["a"]}),
        ):
            reply = httpx.post(address + route, json=body)
            assert reply.status_code == 404
            assert "start it with --" in reply.json()["error"]["message"]


def test_many_callers_at_once_get_their_own_answers(live, models):
    address, service = live
    texts = [f"The heron waits {number} days." for number in range(60)]
    wanted = encoded(models, texts)
    with httpx.Client(base_url=address, timeout=60) as http:

        def ask(number):
            while True:
                reply = http.post("/embed", json={"inputs": texts[number]})
                if reply.status_code != 429:
                    return np.array(reply.json()[0], np.float32)
                time.sleep(0.05)

        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            found = np.array(list(pool.map(ask, range(len(texts)))))
    np.testing.assert_allclose(found, wanted, **SAME)
    assert service.queue.most_tokens <= service.queue.bound
