"""What the server refuses, and how it fares with callers who are slow, wrong, hostile or gone."""

import json
import socket

import httpx
import numpy as np
import pytest
import serving
from serving import serve

from sgpt_jax.serve.http import Limits


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nul", b'{"input": NaN}', b"\xff", b'{"input": "\\ud8zz"}', b"[" * 5000]
)
def test_what_is_no_json_object_is_refused(http, body):
    reply = http.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"x\ud83d", "x\ufffd"),
        (r"\uDE00 \ud83d\ud83d\uDe00", "\ufffd \ufffd😀"),
        (r"\\ud83d \\\ud83d\n", "\\ud83d \\\ufffd\n"),
    ],
)
def test_lone_surrogates_are_replaced(escaped, text, http):
    def embedded(content):
        return http.post("/embed", content=content, headers={"content-type": "application/json"})

    reply = embedded(f'{{"inputs": "{escaped}"}}'.encode())
    assert reply.status_code == 200
    assert reply.json() == embedded(json.dumps({"inputs": text}).encode()).json()


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


def test_web_pages_of_others_are_let_in_on_demand_alone(live, http):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    ask |= {"access-control-request-headers": "authorization,content-type,x-stainless-os"}
    for reply in (http.options("/embed", headers=ask), http.get("/health", headers=ask)):
        assert not any(name.startswith("access-control") for name in reply.headers)
    # What a page may send without asking is refused.
    plain = http.post("/embed", content=b'{"inputs": "a"}', headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    with serving.listening_with(live[1], Limits(api_key="k"), ["https://a.example"]) as address:
        allowed = httpx.options(f"{address}/embed", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"].lower()
        exposed = httpx.get(f"{address}/health", headers=ask).headers["access-control-expose-headers"]
        assert "x-texts-cut" in exposed and "retry-after" in exposed
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
