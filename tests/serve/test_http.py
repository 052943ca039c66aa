"""The routes as their clients use them: OpenAI's own client, Cohere's and TEI's requests, search, limits, faults."""

import base64
import concurrent.futures
import dataclasses
import json
import socket
import time
import warnings

import httpx
import numpy as np
import pytest
import serving
from serving import DOCUMENTS, serve

from sgpt_jax.serve.batching import Job
from sgpt_jax.serve.http import Limits

openai = pytest.importorskip("openai", reason="needs OpenAI's client")

TEXTS = ["The heron waits.", "", "The ferry crosses the bay twice a day. " * 5, "ßpaß 😀", "heron"]
# Matrix products round differently with the shape of the batch that a text happens to be in.
SAME = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return serving.tiny_models(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def live(models):
    with serve(models, bound=2000) as (address, service):
        yield address, service


@pytest.fixture
def http(live):
    with httpx.Client(base_url=live[0], timeout=60) as client:
        yield client


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
    # With the model's brackets around them already they do not get them twice.
    framed = models.encoder.text.ids(["heron"], "document")[0]
    np.testing.assert_allclose(
        vectors(client.embeddings.create(model="tiny", input=framed)), wanted[4:], **SAME
    )


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


@pytest.fixture
def blocked(live, monkeypatch):
    """The device is busy with a text until something is appended to this list."""
    _, service = live
    let, begun = [], []
    start = service.embedder.start

    def slow(items, plan):
        fetch = start(items, plan)
        begun.append(True)

        def wait():
            serving.until(lambda: let)
            return fetch()

        return wait

    monkeypatch.setattr(service.embedder, "start", slow)
    service.queue.put(Job("embed", "other", [[1]], [1]))
    serving.until(lambda: begun)
    yield let
    let.append(True)


def test_429_is_tried_again_and_succeeds(live, client, models, blocked):
    _, service = live
    waiting = Job("embed", "other", [[1] * 30] * 66, [30] * 66)
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


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nul", b'{"input": NaN}', b"\xff", b'{"input": "\\ud800"}', b"[" * 5000]
)
def test_what_is_no_json_object_is_refused(http, body):
    reply = http.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_json"


def test_vectors_that_are_not_finite_are_an_error_and_no_null(live, http, monkeypatch):
    _, service = live
    start = service.embedder.start

    def broken(items, plan):
        fetch = start(items, plan)
        return lambda: np.where(np.arange(32) == 7, np.nan, fetch())

    monkeypatch.setattr(service.embedder, "start", broken)
    for route, body in (
        ("/v1/embeddings", {"input": "a"}),
        ("/embed", {"inputs": "a"}),
        ("/search", {"query": "a"}),
    ):
        reply = http.post(route, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "not_finite")
        assert reply.headers["x-should-retry"] == "false"


def test_until_it_is_ready_it_lives_but_answers_503():
    with serve(None) as (address, service):
        assert httpx.get(f"{address}/health/live").status_code == 200
        health = httpx.get(f"{address}/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        for reply in (
            httpx.post(f"{address}/v1/embeddings", json={"input": "a"}),
            httpx.get(f"{address}/info"),
        ):
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
        assert httpx.get(address).status_code == 200  # the page says so itself
        assert service.queue.tokens == 0


def test_ready(http):
    assert http.get("/health").json() == {"status": "ready"}


def test_other_routes_and_methods(http):
    assert (http.get("/nowhere").status_code, http.get("/search").status_code) == (404, 405)
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


def test_key(live):
    with serving.listening_with(live[1], Limits(api_key="secret")) as address:
        routes = ("/info", "/v1/models", "/metrics")
        for key in (None, "Secret", "secrets", "sécret"):
            headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
            for route in routes:
                reply = httpx.get(address + route, headers=headers)
                assert (reply.status_code, reply.json()["error"]["type"]) == (401, "authentication_error")
        assert httpx.post(f"{address}/embed", json={"inputs": "a"}).status_code == 401
        for route in routes:
            assert httpx.get(address + route, headers={"authorization": "bearer secret"}).status_code == 200
        for route in ("/health", "/health/live", "/", "/page.js"):
            assert httpx.get(address + route).status_code == 200
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.embeddings.create(model="tiny", input="a")


def test_web_pages_of_others_are_let_in_on_demand_alone(live, http):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    ask |= {"access-control-request-headers": "authorization,content-type"}
    for reply in (http.options("/embed", headers=ask), http.get("/health", headers=ask)):
        assert not any(name.startswith("access-control") for name in reply.headers)
    # What a page may send without asking is refused.
    plain = http.post("/embed", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    with serving.listening_with(live[1], Limits(api_key="k"), ["https://a.example"]) as address:
        allowed = httpx.options(f"{address}/embed", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = httpx.options(f"{address}/embed", headers=ask | {"origin": "https://b.example"})
        assert other.status_code == 400


def test_the_page_asks_no_other_host(http):
    reply = http.get("/")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for route in ("/", "/page.css", "/page.js"):
        text = http.get(route).text
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text


def test_metrics_hold_no_text_of_users(http):
    http.post("/embed", json={"inputs": "a secret of mine"})
    http.get("/v1/models/a secret of mine")
    http.get("/a secret of mine?q=secret")
    text = http.get("/metrics").text
    assert 'sgpt_requests_total{route="/embed",status="200"}' in text
    assert 'sgpt_items_total{lane="embed"}' in text
    assert "secret" not in text


def raw(address, data=b""):
    host, _, port = address.removeprefix("http://").partition(":")
    found = socket.create_connection((host, int(port)), timeout=20)
    found.sendall(data)
    return found


def head(length, route="/embed"):
    lines = f"POST {route} HTTP/1.1", "host: a", "content-type: application/json", f"content-length: {length}"
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_large_slow_and_half_bodies(live):
    limits = Limits(body_bytes=1000, body_seconds=0.3)
    with serving.listening_with(live[1], limits) as address:
        large = httpx.post(f"{address}/embed", json={"inputs": "a" * 5000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        # In pieces, whose sum nobody says at the start.
        pieces = httpx.post(
            f"{address}/embed",
            content=(b"a" * 400 for _ in range(9)),
            headers={"content-type": "application/json"},
        )
        assert pieces.status_code == 413
        with raw(address, head(100) + b'{"inputs"') as slow:
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with raw(address, head(100) + b'{"inputs"'):
            pass  # leaves in the middle of its body
        with raw(address, b"no HTTP at all\r\n\r\n") as odd:
            assert odd.recv(1000).startswith(b"HTTP/1.1 400")
        assert httpx.post(f"{address}/embed", json={"inputs": "a"}).status_code == 200


def test_callers_who_leave_are_dropped(live, blocked):
    address, service = live
    body = json.dumps({"inputs": ["heron"] * 50}).encode()
    before = service.queue.dropped
    with raw(address, head(len(body)) + body):
        serving.until(lambda: service.queue.tokens > 50)
    serving.until(lambda: service.queue.tokens == 0)
    assert service.queue.dropped == before + 50
    blocked.append(True)
    assert httpx.post(f"{address}/embed", json={"inputs": "heron"}, timeout=60).status_code == 200


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
