"""Exact search of a streamed corpus with a bi-encoder: top k on the device, one chunk of it at a time."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.runtime import processes

CHUNK = 16_384  # documents that are encoded and scored at a time
_QUERIES = 1_024  # queries a block of scores holds, which bounds it to 64 MiB


class Encoder(Protocol):
    """What is asked of a bi-encoder: `sgpt_jax.BiEncoder` has it."""

    def encode_query(self, texts: list[str], **options: Any) -> np.ndarray: ...

    def encode_document(self, texts: list[str], **options: Any) -> np.ndarray: ...


def search(
    model: Encoder,
    queries: Mapping[str, str],
    documents: Iterable[Document],
    k: int,
    *,
    chunk: int | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """The k documents of highest cosine for every query, as a run.

    Only one chunk of the corpus is held at a time. In a `processes.session` every process passes over the corpus and
    takes its turn of the chunks; all of them return the run that one process would. Ties at the cut go to the higher
    document id, as they rank in trec_eval, also across chunks.

    Args:
        model: a bi-encoder.
        queries: {id: text}.
        documents: the corpus, read once.
        k: documents to keep; all of them when the corpus is smaller.
        chunk: documents that are encoded at a time; None for CHUNK.
        options: passed on to ``encode_query`` and ``encode_document``.

    Raises:
        InputError: a vector that is not finite, with the query's or document's id.
    """
    names = list(queries)
    vectors = _checked(model.encode_query(list(queries.values()), **options), "query", names)
    best: list[list[tuple[float, str]]] = [[] for _ in names]  # heaps: the worst kept entry comes first
    with tqdm(desc="documents", unit="", disable=None, delay=1) as bar:
        for number, part in enumerate(_chunks(documents, chunk or CHUNK)):
            if not processes.mine(number):
                continue
            processes.check()
            # Descending ids: of equal scores top_k keeps the earlier, which is then the one that ranks first.
            part.sort(key=lambda document: document.id, reverse=True)
            ids = [document.id for document in part]
            texts = [document.text for document in part]
            encoded = _checked(model.encode_document(texts, **options), "document", ids)
            for start in range(0, len(names), _QUERIES):
                block = vectors[start : start + _QUERIES]
                scores, places = _top_k(block, encoded, min(k, len(part)))
                heaps = best[start : start + _QUERIES]
                _merge(heaps, ids, np.asarray(scores), np.asarray(places), k)
            bar.update(len(part))
    if processes.count() > 1:
        shares = zip(*processes.gather(best), strict=True)
        best = [heapq.nlargest(k, map(tuple, itertools.chain(*heaps))) for heaps in shares]
    return {
        name: {id: score for score, id in sorted(heap, reverse=True)}
        for name, heap in zip(names, best, strict=True)
    }


@functools.partial(jax.jit, static_argnames="k")
def _top_k(queries: jax.Array, documents: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Cosine [q, E] x [n, E] -> the k highest of every row and their columns, [q, k] float32 and int32."""
    queries, documents = (
        x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, documents)
    )
    scores = jnp.matmul(queries, documents.T, precision=jax.lax.Precision.HIGHEST)
    values, places = jax.lax.top_k(scores, k)
    return values, places


def _merge(
    heaps: list[list[tuple[float, str]]], ids: list[str], scores: np.ndarray, places: np.ndarray, k: int
) -> None:
    """Puts candidates [q, k] into the heaps of their queries, which hold up to k each."""
    floor = [heap[0][0] if len(heap) == k else -np.inf for heap in heaps]
    rows, columns = np.nonzero(scores >= np.asarray(floor)[:, None])
    entries = zip(rows.tolist(), scores[rows, columns].tolist(), places[rows, columns].tolist(), strict=True)
    for row, score, place in entries:
        heap, entry = heaps[row], (score, ids[place])
        if len(heap) < k:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)


def _chunks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    stream = iter(documents)
    while part := list(itertools.islice(stream, size)):
        yield part


def _checked(vectors: np.ndarray, kind: str, ids: list[str]) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise InputError(f"the vector of {kind} {ids[int(np.argmin(finite))]!r} is not finite")
    return vectors
