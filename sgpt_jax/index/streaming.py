"""Exact search of a corpus that is encoded while it streams by, and kept nowhere: evaluation and training use it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.columns import normalized, pack_strings, unpack_strings
from sgpt_jax.index.topk import Block, exact_top_k
from sgpt_jax.metrics import rank
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.progress import Progress, progress

CHUNK = 16_384  # documents that are encoded and scored at a time


class Encoder(Protocol):
    """What is asked of a bi-encoder: `sgpt_jax.BiEncoder` has it."""

    @property
    def similarity_name(self) -> str: ...

    def encode_query(
        self, texts: Sequence[str], *, batch_tokens: int | None = ..., show_progress: bool | None = ...
    ) -> np.ndarray: ...

    def encode_document(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int | None = ...,
        show_progress: bool | Progress | None = ...,
    ) -> np.ndarray: ...


def search_corpus(
    model: Encoder,
    queries: Mapping[str, str],
    documents: Iterable[Document],
    k: int,
    *,
    chunk: int | None = None,
    batch_tokens: int | None = None,
    show_progress: bool | None = None,
    share: bool = True,
) -> dict[str, dict[str, float]]:
    """The k documents of highest similarity (cosine or dot product, as the model has it) for every query, as a run,
    best first.

    Only one chunk of the corpus is held at a time, and its ids. In a `processes.session` every process passes over the
    corpus and takes its turn of the chunks; all of them return the run that one process would. Ties rank as in
    trec_eval, also at the cut and across chunks.

    Args:
        model: a bi-encoder.
        queries: {id: text}.
        documents: the corpus, read once.
        k: documents to keep; all of them when the corpus is smaller.
        chunk: documents that are encoded at a time; None for CHUNK.
        batch_tokens: see `BiEncoder.encode`.
        show_progress: None shows a bar on a terminal after a second.
        share: False for a model that is spread over the processes, which then encode every chunk together.

    Raises:
        InputError: a vector that is not finite, with the query's or document's id; the model compares vectors by a
            distance.
    """
    if model.similarity_name not in ("cosine", "dot"):
        raise InputError(
            f"the model compares vectors by {model.similarity_name} distance; a corpus is searched by cosine or dot "
            "product"
        )
    size, cosine = chunk or CHUNK, model.similarity_name == "cosine"
    encoded = model.encode_query(list(queries.values()), batch_tokens=batch_tokens, show_progress=False)
    vectors = _checked(encoded, "query", list(queries), cosine)
    ids = _ChunkIds(size)

    def blocks() -> Iterator[Block]:
        with progress("searching", "doc", show=show_progress) as bar:
            stream = iter(documents)
            for number in itertools.count():
                part = list(itertools.islice(stream, size))
                if not part:
                    return
                if share and not processes.mine(number):
                    continue
                processes.check()
                names = [document.id for document in part]
                texts = [document.text for document in part]
                encoded = model.encode_document(texts, batch_tokens=batch_tokens, show_progress=bar)
                encoded = _checked(encoded, "document", names, cosine)
                if number:  # a block like those before it
                    encoded = np.pad(encoded, ((0, size - len(part)), (0, 0)))
                ids.add(number, names)
                yield Block(encoded, None, number * size, 0, len(part))

    scores, rows = exact_top_k(vectors, np.zeros(len(vectors), np.float32), blocks(), k, ids)
    found = [
        dict(zip(ids(some), values.tolist(), strict=True)) for some, values in zip(rows, scores, strict=True)
    ]
    shares = zip(*(processes.gather(found) if share else [found]), strict=True)
    return {
        query: rank({id: score for hits in share for id, score in hits.items()}, k, query=query)
        for query, share in zip(queries, shares, strict=True)
    }


class _ChunkIds:
    """The ids of the rows that have passed by, as bytes: a corpus can have millions."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._chunks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, number: int, ids: list[str]) -> None:
        """Adds those of a chunk."""
        columns = pack_strings(ids, 0, "id")
        blob, ends = np.frombuffer(columns["ids"], np.uint8), np.frombuffer(columns["id-ends"], np.uint64)
        self._chunks[number] = blob, ends

    def __call__(self, rows: np.ndarray) -> list[str]:
        """The ids of some rows."""
        ids = [""] * len(rows)
        numbers = rows // self._size
        for number in np.unique(numbers):
            members = np.flatnonzero(numbers == number)
            found = unpack_strings(*self._chunks[int(number)], rows[members] - number * self._size)
            for member, id in zip(members.tolist(), found, strict=True):
                ids[member] = id
        return ids


def _checked(vectors: np.ndarray, kind: str, ids: list[str], cosine: bool) -> np.ndarray:
    """The vectors as float32, for cosines of length 1 (a zero vector stays)."""
    vectors = np.asarray(vectors, np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise InputError(f"the vector of {kind} {ids[int(np.argmin(finite))]!r} is not finite")
    return normalized(vectors) if cosine else vectors
