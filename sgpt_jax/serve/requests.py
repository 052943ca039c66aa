"""What callers may ask for: the JSON of every route, checked field by field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sgpt_jax.serve.errors import ApiError
from sgpt_jax.text.encoder import Side

# As OpenAI and Cohere have them.
MOST_TEXTS, MOST_DOCUMENTS = 2048, 1000

Texts = list[str] | list[list[int]]
"""Texts, or the token ids of texts."""


def _wrong(name: str, message: str) -> ApiError:
    return ApiError(400, f"{name}: {message}", param=name, code="invalid_value")


@dataclass(frozen=True)
class Fields:
    """The fields of a request's JSON object. Null is the same as a field that is not there."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, body: Any) -> Fields:
        """Checks that the JSON is an object."""
        if not isinstance(body, dict):
            raise ApiError(400, "the request's body is to be a JSON object", code="invalid_json")
        return cls({name: value for name, value in body.items() if value is not None})

    def required(self, name: str) -> Any:
        """A field that has to be there."""
        if name not in self.values:
            raise ApiError(400, f"{name} is missing", param=name, code="missing_field")
        return self.values[name]

    def text(self, name: str, default: str | None = None) -> str:
        """A str; it has to be there where there is no default."""
        value = self.required(name) if default is None else self.values.get(name, default)
        if not isinstance(value, str):
            raise _wrong(name, "must be a string")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of some words, by default the first."""
        value = self.values.get(name, choices[0])
        if value not in choices:
            raise _wrong(name, f"must be one of {', '.join(choices)}")
        return cast(str, value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise _wrong(name, "must be true or false")
        return value

    def number(self, name: str, default: int | None, least: int, most: int | None = None) -> int | None:
        """A whole number within limits."""
        value = self.values.get(name, default)
        if value is None:
            return None
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        if not _is_int(value) or value < least or (most is not None and value > most):
            raise _wrong(name, f"must be a whole number {limits}")
        return cast(int, value)

    def model(self, name: str) -> None:
        """Refuses a request for another model than this server's."""
        if self.values.get("model", name) != name:
            raise ApiError(
                404, f"this server has no such model here, but {name}", param="model", code="model_not_found"
            )

    def check_direction(self) -> None:
        """Refuses TEI's truncation of texts from the left."""
        if self.text("truncation_direction", "right").lower() != "right":
            raise _wrong("truncation_direction", "only Right is served")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(value: Any, name: str, most: int) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _wrong(name, "must be a list that is not empty")
    if len(value) > most:
        raise _wrong(name, f"has {len(value)} elements, more than {most}")
    return value


def read_texts(fields: Fields, name: str) -> Texts:
    """OpenAI's four kinds of input: a text, a list of texts, the token ids of a text, a list of these."""
    value = fields.required(name)
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(map(_is_int, value)):
        return [value]
    value = _list_of(value, name, MOST_TEXTS)
    if all(isinstance(text, str) for text in value):
        return value
    if all(isinstance(ids, list) and ids and all(map(_is_int, ids)) for ids in value):
        return value
    raise _wrong(name, "must be a string, a list of strings, a list of token ids, or a list of such lists")


def read_documents(fields: Fields, name: str) -> list[str]:
    """Documents as strings or as {"text": string}."""
    documents = []
    for number, document in enumerate(_list_of(fields.required(name), name, MOST_DOCUMENTS)):
        text = document.get("text") if isinstance(document, dict) else document
        if not isinstance(text, str):
            raise _wrong(name, f'element {number} must be a string or {{"text": string}}')
        documents.append(text)
    return documents


@dataclass(frozen=True)
class EmbeddingRequest:
    """POST /v1/embeddings."""

    texts: Texts
    side: Side
    base64: bool
    truncate: bool
    dimensions: int | None

    @classmethod
    def of(cls, body: Any, model: str, width: int) -> EmbeddingRequest:
        """Reads the JSON; `width` is the length of the model's vectors."""
        fields = Fields.of(body)
        fields.model(model)
        return cls(
            read_texts(fields, "input"),
            cast(Side, fields.choice("input_type", ("document", "query"))),
            fields.choice("encoding_format", ("float", "base64")) == "base64",
            fields.flag("truncate", True),
            fields.number("dimensions", None, 1, width),
        )


@dataclass(frozen=True)
class EmbedRequest:
    """POST /embed, as text-embeddings-inference has it."""

    texts: Texts
    side: Side
    normalize: bool
    truncate: bool
    dimensions: int | None

    @classmethod
    def of(cls, body: Any, width: int) -> EmbedRequest:
        """Reads the JSON; `width` is the length of the model's vectors."""
        fields = Fields.of(body)
        fields.check_direction()
        return cls(
            read_texts(fields, "inputs"),
            cast(Side, fields.choice("prompt_name", ("document", "query"))),
            fields.flag("normalize", True),
            fields.flag("truncate", True),
            fields.number("dimensions", None, 1, width),
        )


@dataclass(frozen=True)
class RerankRequest:
    """POST /rerank in all its dialects.

    Attributes:
        tei: asked as text-embeddings-inference is, with `texts`; the reply is a list.
        raw: scores as the model gives them; else from 0 to 1, in the same order.
        truncate: whether texts that are too long are cut, or refused.
        top_n: how many to return; None for all.
        document_tokens: of a document, how many are read; None for all that the model can.
        return_documents: with their texts.
        return_tokens: with the log-probability of each token of the query.
    """

    query: str
    documents: list[str]
    tei: bool
    raw: bool
    truncate: bool
    top_n: int | None
    document_tokens: int | None
    return_documents: bool
    return_tokens: bool

    @classmethod
    def of(cls, body: Any, model: str) -> RerankRequest:
        """Reads the JSON."""
        fields = Fields.of(body)
        fields.model(model)
        fields.check_direction()
        tei = "texts" in fields.values
        if tei and "documents" in fields.values:
            raise ApiError(400, "give either texts or documents", param="texts", code="invalid_value")
        return cls(
            fields.text("query"),
            read_documents(fields, "texts" if tei else "documents"),
            tei,
            fields.flag("raw_scores", not fields.flag("use_activation", True)),
            fields.flag("truncate", True),
            # vLLM's clients say 0 for all.
            fields.number("top_n", None, 0) or None,
            fields.number("max_tokens_per_doc", None, 1),
            fields.flag("return_text" if tei else "return_documents", False),
            fields.flag("return_tokens", False),
        )


@dataclass(frozen=True)
class SearchRequest:
    """POST /search.

    Attributes:
        query: the text, or None where there is a vector.
        vector: of the query, or None.
        k: hits to return.
        rerank: of the first stage's hits, how many the cross-encoder orders anew; 0 for none.
        return_documents: with their whole texts.
        return_tokens: with the log-probability of each token of the query.
    """

    query: str | None
    vector: list[float] | None
    k: int
    rerank: int
    return_documents: bool
    return_tokens: bool

    @classmethod
    def of(cls, body: Any, model: str, most: int) -> SearchRequest:
        """Reads the JSON; `most` hits can be had."""
        fields = Fields.of(body)
        fields.model(model)
        if unknown := sorted(
            fields.values.keys() - {"model", *(field.name for field in dataclasses.fields(cls))}
        ):
            raise _wrong(unknown[0], "is no field of /search")
        if ("query" in fields.values) == ("vector" in fields.values):
            raise ApiError(400, "give either query or vector", param="query", code="invalid_value")
        rerank = fields.number("rerank", 0, 0, min(most, MOST_DOCUMENTS)) or 0
        k = fields.number("k", min(10, rerank or 10), 1, most) or 0
        return_tokens = fields.flag("return_tokens", False)
        if 0 < rerank < k:
            raise _wrong("k", f"asks for more documents than the {rerank} that rerank scores")
        if "vector" in fields.values and (rerank or return_tokens):
            raise _wrong("vector", "the cross-encoder needs the query's text")
        if return_tokens and k > MOST_DOCUMENTS:
            raise _wrong("k", f"with return_tokens must be at most {MOST_DOCUMENTS}")
        return cls(
            fields.text("query") if "query" in fields.values else None,
            _read_vector(fields.values["vector"]) if "vector" in fields.values else None,
            k,
            rerank,
            fields.flag("return_documents", False),
            return_tokens,
        )


def _read_vector(value: Any) -> list[float]:
    numbers = isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 3e38 and math.isfinite(x)
        for x in value
    )
    if not numbers:
        raise _wrong("vector", "must be a list of finite numbers")
    return cast(list[float], value)
