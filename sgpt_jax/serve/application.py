"""The routes: OpenAI's embeddings, Cohere's and TEI's re-ranking, search, the page, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Sequence
from importlib import metadata, resources
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sgpt_jax.serve.errors import ApiError
from sgpt_jax.serve.http import Door, Limits, dumps, error_response, json_response
from sgpt_jax.serve.metrics import Metrics
from sgpt_jax.serve.requests import (
    MOST_TEXTS,
    EmbeddingRequest,
    EmbedRequest,
    RerankRequest,
    SearchRequest,
)
from sgpt_jax.serve.service import Scored, Service

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    # The page may load its own two files and ask its own server, nothing else, whatever a document holds.
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
# Vectors turned into JSON before others get their turn.
_ROWS_AT_ONCE = 64


def make_application(
    service: Service, metrics: Metrics, limits: Limits, origins: Sequence[str] = ()
) -> Starlette:
    """The ASGI application.

    Args:
        service: answers; it may still be loading.
        metrics: counts.
        limits: of requests.
        origins: web pages of other origins that may call, such as "https://example.org"; none by default.
    """
    routes = Routes(service)
    door = Door(limits, metrics, lambda: service.ready)
    posts = {
        "/v1/embeddings": routes.embeddings,
        "/embed": routes.embed,
        "/v1/rerank": routes.rerank,
        "/v2/rerank": routes.rerank,
        "/rerank": routes.rerank,
        "/search": routes.search,
    }
    gets = {
        "/v1/models": routes.models,
        "/v1/models/{name:path}": routes.model,
        "/info": routes.info,
    }
    return Starlette(
        routes=[
            *(Route(path, door.post(path, work), methods=["POST"]) for path, work in posts.items()),
            *(
                Route(path, door.get(path, work, needs_ready=True), methods=["GET"])
                for path, work in gets.items()
            ),
            Route("/metrics", door.get("/metrics", lambda _: _metrics(metrics)), methods=["GET"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/health/live", _live, methods=["GET"]),
            *(Route(path, _file(*page), methods=["GET"]) for path, page in _PAGE.items()),
        ],
        # Outermost, so that a browser's question whether it may ask is answered without a key.
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's client sends several of its own
                expose_headers=["x-request-id", "x-texts-cut", "retry-after"],
            )
        ]
        if origins
        else [],
        exception_handlers={HTTPException: _unrouted},
    )


def _unrouted(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, error.detail, code="no_such_route"))


async def _live(_: Request) -> Response:
    return json_response({"status": "live"})


def _metrics(metrics: Metrics) -> Response:
    return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _file(name: str, kind: str) -> Any:
    content = (resources.files("sgpt_jax.serve") / "page" / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return endpoint


class Routes:
    """The work of every route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._since = int(time.time())

    async def embeddings(self, body: Any, caller: str) -> Response:
        """POST /v1/embeddings."""
        encoder = self._service.models.encoder
        asked = EmbeddingRequest.of(body, encoder.name, encoder.dimension)
        found = await self._service.embed(asked.texts, asked.side, caller, param="input", cut=asked.truncate)
        vectors = shortened(found.vectors, asked.dimensions, unit=True)
        values: Sequence[str | orjson.Fragment]
        if asked.base64:
            values = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
        else:
            values = await _rows_as_json(vectors)
        data = [
            {"object": "embedding", "index": number, "embedding": value}
            for number, value in enumerate(values)
        ]
        reply = {"object": "list", "data": data, "model": encoder.name, "usage": _usage(found.tokens)}
        return json_response(reply, headers=_cut(found.cut))

    async def embed(self, body: Any, caller: str) -> Response:
        """POST /embed, as TEI has it."""
        asked = EmbedRequest.of(body, self._service.models.encoder.dimension)
        found = await self._service.embed(asked.texts, asked.side, caller, param="inputs", cut=asked.truncate)
        vectors = shortened(found.vectors, asked.dimensions, unit=asked.normalize)
        return json_response(await _rows_as_json(vectors), headers=_cut(found.cut))

    async def rerank(self, body: Any, caller: str) -> Response:
        """POST /rerank, in Cohere's, Jina's, vLLM's and TEI's dialects."""
        asked = RerankRequest.of(body, self._cross_encoder())
        scored = await self._service.score(
            asked.query,
            asked.documents,
            caller,
            asked.document_tokens,
            param="texts" if asked.tei else "documents",
            cut=asked.truncate,
        )
        headers = _cut(scored.documents_cut + scored.query_cut)
        scores = scored.raw if asked.raw else scored.shares
        order = sorted(range(len(scores)), key=lambda number: -scores[number])[: asked.top_n]
        if asked.tei:
            return json_response(
                [
                    {"index": number, "score": scores[number]}
                    | ({"text": asked.documents[number]} if asked.return_documents else {})
                    for number in order
                ],
                headers=headers,
            )
        tokens = await self._tokens(asked.query, scored) if asked.return_tokens else None
        results = [
            {"index": number, "relevance_score": scores[number]}
            | ({"document": {"text": asked.documents[number]}} if asked.return_documents else {})
            | ({"tokens": tokens[number]} if tokens else {})
            for number in order
        ]
        return json_response(
            {
                "id": uuid.uuid4().hex,
                "model": self._cross_encoder(),
                "results": results,
                "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
                "usage": _usage(scored.tokens),
            },
            headers=headers,
        )

    async def search(self, body: Any, caller: str) -> Response:
        """POST /search over the index."""
        service, begin = self._service, time.perf_counter()
        if service.searcher is None:
            raise ApiError(404, "this server has no index: start it with --index", code="no_index")
        asked = SearchRequest.of(body, service.models.encoder.name, service.searcher.most)
        if asked.rerank or asked.return_tokens:
            self._cross_encoder()
            if not service.searcher.index.manifest.store_texts:
                raise ApiError(400, "the index holds no texts to re-rank", param="rerank", code="no_texts")
        vector, cut = await self._query_vector(asked, caller)
        hits = await service.search(vector, max(asked.k, asked.rerank), caller)
        searched = time.perf_counter()
        scored, order = None, list(range(len(hits)))
        if asked.rerank or asked.return_tokens:
            assert asked.query is not None
            scored = await service.score(asked.query, [hit.text for hit in hits], caller)
            cut = max(cut, scored.query_cut) + scored.documents_cut
            if asked.rerank:
                order.sort(key=lambda number: -scored.raw[number])
        order = order[: asked.k]
        tokens = (
            await self._tokens(asked.query, scored)
            if asked.query and scored and asked.return_tokens
            else None
        )
        found = []
        for number in order:
            one = hits[number]
            hit: dict[str, Any] = {
                "id": one.id,
                "title": one.title,
                "snippet": one.snippet,
                "score": one.score,
            }
            if scored:
                hit["rerank_score"] = scored.raw[number]
            if tokens:
                hit["tokens"] = tokens[number]
            if asked.return_documents:
                hit["text"] = one.text
            found.append(hit)
        end = time.perf_counter()
        return json_response(
            {
                "hits": found,
                "documents": len(service.searcher.index),
                "seconds": {"search": searched - begin, "rerank": end - searched if scored else 0.0},
            },
            headers=_cut(cut),
        )

    def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": self._models()})

    def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        for entry in self._models():
            if entry["id"] == request.path_params["name"]:
                return json_response(entry)
        raise ApiError(404, "this server has no such model", param="model", code="model_not_found")

    def info(self, _: Request) -> Response:
        """GET /info, as TEI has it, and what the page wants to know."""
        service = self._service
        models = service.models
        return json_response(
            {
                "model_id": models.encoder.name,
                "model_dtype": models.encoder.decoder.dtype.name,
                "model_type": {"embedding": {"pooling": models.encoder.pooling}},
                "max_input_length": models.encoder.text.max_seq_length,
                "max_batch_tokens": service.embedder.budget,
                "max_client_batch_size": MOST_TEXTS,
                "auto_truncate": True,
                "version": metadata.version("sgpt-jax"),
                "dimensions": models.encoder.dimension,
                "cross_encoder": models.cross_encoder and models.cross_encoder.name,
                "explains": models.cross_encoder is not None and models.cross_encoder.scoring is None,
                "documents": None if models.index is None else len(models.index),
                "max_queue_tokens": service.queue.bound,
            }
        )

    async def health(self, _: Request) -> Response:
        """GET /health: 200 when requests are answered."""
        if self._service.ready:
            return json_response({"status": "ready"})
        state = "failed" if self._service.state == "ready" else self._service.state
        return json_response({"status": state}, 503, {"retry-after": "2"})

    def _models(self) -> list[dict[str, Any]]:
        models = self._service.models
        names = dict.fromkeys(model.name for model in (models.encoder, models.cross_encoder) if model)
        return [
            {"id": name, "object": "model", "created": self._since, "owned_by": "sgpt-jax"} for name in names
        ]

    def _cross_encoder(self) -> str:
        model = self._service.models.cross_encoder
        if model is None:
            raise ApiError(
                404, "this server does not re-rank: start it with --cross-encoder", code="no_cross_encoder"
            )
        return model.name

    async def _query_vector(self, asked: SearchRequest, caller: str) -> tuple[np.ndarray, int]:
        """The query's vector, float32 [E], and 1 if the query was too long and cut, else 0."""
        if asked.vector is None:
            assert asked.query is not None
            found = await self._service.embed([asked.query], "query", caller, param="query")
            return found.vectors[0], found.cut
        width = self._service.models.encoder.dimension
        if len(asked.vector) != width:
            raise ApiError(
                400,
                f"vector: has {len(asked.vector)} dimensions, the index {width}",
                param="vector",
                code="invalid_value",
            )
        return np.array(asked.vector, np.float32), 0

    async def _tokens(self, query: str, scored: Scored) -> list[list[dict[str, Any]]]:
        """For each document the query's tokens with their log-probabilities."""
        if scored.log_probs is None:
            raise ApiError(
                400,
                "this server's re-ranker gives no log-probabilities of tokens",
                param="return_tokens",
                code="no_log_probs",
            )
        pieces = await self._service.query_tokens(query)
        return [
            [{"text": text, "log_prob": value} for text, value in zip(pieces, values, strict=False)]
            for values in scored.log_probs
        ]


def shortened(vectors: np.ndarray, dimensions: int | None, unit: bool) -> np.ndarray:
    """The first dimensions of float32 vectors [n, E], of length 1 if `unit`; zero vectors stay zero."""
    vectors = np.ascontiguousarray(vectors[:, :dimensions], np.float32)
    if unit:
        norms = np.sqrt(np.sum(vectors * vectors, axis=-1, keepdims=True))
        vectors = vectors / np.maximum(norms, np.float32(1e-12))
    return vectors


async def _rows_as_json(vectors: np.ndarray) -> list[orjson.Fragment]:
    """Each row as JSON, in turns with what else the server has to do."""
    rows = []
    for number, row in enumerate(vectors):
        rows.append(orjson.Fragment(dumps(row)))
        if number % _ROWS_AT_ONCE == _ROWS_AT_ONCE - 1:
            await asyncio.sleep(0)
    return rows


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _cut(texts: int) -> dict[str, str]:
    """Says how many texts were too long and were cut."""
    return {"x-texts-cut": str(texts)} if texts else {}
