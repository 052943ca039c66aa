"""What a server has loaded, and its answers as arrays: texts in, through the batching queue, to vectors and scores."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.errors import InputError
from sgpt_jax.index.hits import Hit
from sgpt_jax.index.search import Index
from sgpt_jax.serve.batching import BatchReport, Job, Queue, Worker
from sgpt_jax.serve.errors import ApiError
from sgpt_jax.serve.programs import Embedder, PairReader, Scorer, Searcher, TokenPair, TokenText, Wanted
from sgpt_jax.serve.requests import Texts
from sgpt_jax.text.encoder import Side, TextEncoder
from sgpt_jax.text.pairs import TokenPairs, query_tokens, tokenise_pairs
from sgpt_jax.text.templates import PairIds
from sgpt_jax.text.tokenizer import special_ids

T = TypeVar("T")


@dataclass(frozen=True)
class Models:
    """What is served.

    Attributes:
        encoder: makes vectors.
        cross_encoder: re-ranks, if there is one.
        index: is searched, if there is one.
        document_tokens: of a document, how many the cross-encoder reads; None for all that it can.
    """

    encoder: BiEncoder
    cross_encoder: CrossEncoder | None = None
    index: Index | None = None
    document_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.index is not None and self.index.dimension != self.encoder.dimension:
            raise InputError(
                f"the index has vectors of {self.index.dimension} dimensions, the model makes "
                f"{self.encoder.dimension}: it was built with another model"
            )


@dataclass(frozen=True)
class Embedded:
    """Vectors float32 [n, E], the tokens they were made of, and how many texts were too long and cut."""

    vectors: np.ndarray
    tokens: int
    cut: int


@dataclass(frozen=True)
class Scored:
    """What a cross-encoder says of a query and some documents.

    Attributes:
        raw: of each document its score as the model gives it.
        shares: the same from 0 to 1, in the same order.
        log_probs: for each document the log-probabilities of the query's tokens, float32 [q]; of a re-ranker with a
            scoring of its own None.
        tokens: how many were read.
        documents_cut: how many documents were too long and cut.
        query_cut: 1 if the query was, else 0.
    """

    raw: list[float]
    shares: list[float]
    log_probs: list[np.ndarray] | None
    tokens: int
    documents_cut: int
    query_cut: int


class Service:
    """Models behind a batching queue.

    Made at once; `load` fills it, in a thread of its own. Coroutines of one event loop call the rest.

    Args:
        bound: tokens that may wait.
        on_batch: is told of every batch.
    """

    def __init__(self, bound: int, on_batch: Callable[[BatchReport], object] = lambda report: None) -> None:
        self.queue = Queue((Embedder.name, Scorer.name, Searcher.name), bound)
        self.state = "loading"
        self._on_batch = on_batch
        self._worker: Worker | None = None
        self._frames: dict[Side, tuple[list[int], list[int]]] = {}
        # One thread: tokenizers of Hugging Face refuse to be used by two, and use several threads themselves.
        self._tokenising = concurrent.futures.ThreadPoolExecutor(1, "tokenise")

    def load(self, models: Models, on_program: Callable[[int, int], object] = lambda done, all: None) -> None:
        """Compiles everything and begins to work; `on_program` is told how many programs are ready, of how many."""
        self.models = models
        self.embedder = Embedder(models.encoder)
        self.scorer = None if models.cross_encoder is None else _scorer(models.cross_encoder)
        self.searcher = None if models.index is None else Searcher(models.index)
        lanes = [lane for lane in (self.embedder, self.scorer, self.searcher) if lane is not None]
        total, done = sum(lane.programs for lane in lanes), 0
        self.state = "compiling"
        for lane in lanes:
            for _ in lane.compile():
                done += 1
                on_program(done, total)
        self._worker = Worker(self.queue, lanes, self._on_batch)
        self._worker.start()
        self.state = "ready"

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.state == "ready" and self._worker is not None and self._worker.alive

    def close(self, seconds: float) -> bool:
        """Lets nothing more in and waits for the device; False if it is not done after so many seconds."""
        self.state = "stopping"
        self.queue.close()
        self._tokenising.shutdown(wait=False, cancel_futures=True)
        return self._worker is None or self._worker.join(seconds)

    async def embed(self, texts: Texts, side: Side, caller: str, *, param: str, cut: bool = True) -> Embedded:
        """Vectors of texts or of token ids.

        Args:
            texts: at least one.
            side: query or document.
            caller: whom they are for.
            param: the request's field that has them, for errors.
            cut: whether texts that are too long are cut, or refused.

        Raises:
            ApiError: a token id is not in the vocabulary, a text is too long, the queue is full, or a vector is not
                finite.
        """
        items, too_long = await self._in_thread(self._token_texts, texts, side, param)
        if too_long and not cut:
            limit = self.models.encoder.text.max_seq_length
            raise ApiError(
                413, f"{too_long} texts have more than {limit} tokens", param=param, code="text_too_long"
            )
        sizes = [len(item.ids) for item in items]
        vectors = np.stack(await self._run(Job(Embedder.name, caller, items, sizes)))
        if not np.isfinite(vectors).all():
            number = int(np.argmin(np.isfinite(vectors).all(axis=1)))
            raise ApiError(
                500, f"the vector of text {number} is not finite", param=param, code="not_finite", retry=False
            )
        return Embedded(vectors, sum(sizes), too_long)

    async def score(
        self,
        query: str,
        documents: Sequence[str],
        caller: str,
        document_tokens: int | None = None,
        *,
        param: str | None = None,
        cut: bool = True,
    ) -> Scored:
        """Scores of a query and each of some documents.

        Args:
            query: their query.
            documents: at least one.
            caller: whom they are for.
            document_tokens: how many tokens of a document are read, which does not count as cut; None for all.
            param: the request's field that has the documents, for errors.
            cut: whether texts that are too long are cut, or refused.

        Raises:
            ApiError: a text is too long, the queue is full, or a score is not finite.
        """
        limit = document_tokens or self.models.document_tokens
        tokens = await self._in_thread(self._pairs, query, documents, limit)
        cuts = int(tokens.documents_cut.sum()), int(tokens.queries_cut.any())
        if any(cuts) and not cut:
            assert self.models.cross_encoder is not None
            most = self.models.cross_encoder.text.max_seq_length
            message = f"{sum(cuts)} texts are too long: {most} tokens are read of a document and its query"
            raise ApiError(413, message, param=param, code="text_too_long")
        if isinstance(tokens, PairIds):
            assert isinstance(self.scorer, PairReader)
            sizes = [len(pair) for pair in tokens.ids]
            scores = np.array(await self._run(Job(PairReader.name, caller, tokens.ids, sizes)))
            _check_finite(scores)
            shares = self.scorer.own.shares(scores)
            return Scored(scores.tolist(), shares.tolist(), None, sum(sizes), *cuts)
        pairs = [
            TokenPair(tokens.contexts[context], tokens.queries[asked]) for context, asked in tokens.pairs
        ]
        found: list[np.ndarray] = []
        if pairs:
            found = await self._run(Job(Scorer.name, caller, pairs, [pair.size for pair in pairs]))
        found.append(np.zeros(0, np.float32))  # where the place -1 of an empty query points to
        log_probs = [found[place] for place in tokens.indices.tolist()]
        raw = np.array([values.sum(dtype=np.float64) for values in log_probs])
        _check_finite(raw)
        # The probability that a token of the query has on the (geometric) average; 1 for an empty query.
        shares = np.exp(raw / [max(1, len(values)) for values in log_probs])
        return Scored(raw.tolist(), shares.tolist(), log_probs, sum(pair.size for pair in pairs), *cuts)

    async def search(self, vector: np.ndarray, k: int, caller: str) -> list[Hit]:
        """The k documents of the index with the highest scores for a query's vector, float32 [E]."""
        (hits,) = await self._run(Job(Searcher.name, caller, [Wanted(vector, k)], [1]))
        return hits

    async def query_tokens(self, query: str) -> list[str]:
        """The pieces of a query that the cross-encoder reads as tokens; together they are the query."""
        model = self.models.cross_encoder
        assert model is not None and model.prompt is not None
        return await self._in_thread(query_tokens, model.text, model.prompt, query)

    async def _run(self, job: Job) -> list[Any]:
        self.queue.put(job)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:  # the caller has left
            self.queue.drop(job)
            raise

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, function, *arguments)

    def _token_texts(self, texts: Texts, side: Side, param: str) -> tuple[list[TokenText], int]:
        """Texts as the model reads them, and how many were cut."""
        ids, cut = self._ids(texts, side, param)
        skip = self.models.encoder.skip(self.models.encoder.text.prompt(side), side)
        return [TokenText(row, skip) for row in ids], cut

    def _ids(self, texts: Texts, side: Side, param: str) -> tuple[list[list[int]], int]:
        """Token ids as the model reads them, and how many texts were cut."""
        text, cuts = self.models.encoder.text, [0]
        if isinstance(texts[0], str):
            return text.ids(texts, side, show_progress=False, on_cut=cuts.append), cuts[-1]  # type: ignore[arg-type]
        size = self.models.encoder.decoder.config.vocab_size
        for number, ids in enumerate(texts):
            if wrong := [id for id in ids if not 0 <= id < size]:  # type: ignore[operator, union-attr]
                raise ApiError(
                    400,
                    f"{param}: text {number} has token id {wrong[0]}, outside the model's {size} embeddings",
                    param=param,
                    code="invalid_value",
                )
        own_before, own_after = special_ids(text.tokenizer)
        before, after = self._frame(text, side, param)
        room = text.max_seq_length - len(before) - len(after)
        keep = slice(-room, None) if text.tokenizer.truncation_side == "left" else slice(room)
        rows = []
        for ids in texts:
            row: list[int] = list(ids)  # type: ignore[arg-type]
            # What the tokenizer has put there is in the frame, too. A bracket is the text's own.
            if own_before and row[: len(own_before)] == own_before:
                row = row[len(own_before) :]
            if own_after and row[-len(own_after) :] == own_after:
                row = row[: -len(own_after)]
            cuts[0] += len(row) > room
            rows.append(before + row[keep] + after if row else text.ids([""], side)[0])
        return rows, cuts[0]

    def _frame(self, text: TextEncoder, side: Side, param: str) -> tuple[list[int], list[int]]:
        """What the model has before and after a text: brackets, special tokens."""
        if side not in self._frames:
            (bare,), (full,) = text.plain_ids(["a"]), text.ids(["a"], side)
            starts = [n for n in range(len(full)) if full[n : n + len(bare)] == bare]
            if not starts:
                raise ApiError(
                    400,
                    f"{param}: this model's prompt cannot be put before token ids; send texts",
                    param=param,
                )
            self._frames[side] = full[: starts[-1]], full[starts[-1] + len(bare) :]
        return self._frames[side]

    def _pairs(self, query: str, documents: Sequence[str], limit: int | None) -> PairIds | TokenPairs:
        """The pairs as tokens, as the cross-encoder reads them."""
        model = self.models.cross_encoder
        assert model is not None
        documents = _first_tokens(model.text, documents, limit)
        queries = [query] * len(documents)
        if isinstance(self.scorer, PairReader):
            scoring = self.scorer.own.scoring
            return scoring.form.tokenise(model.text, scoring.prompt, queries, documents, show_progress=False)
        assert model.prompt is not None
        return tokenise_pairs(model.text, model.prompt, queries, documents, show_progress=False)


def _scorer(model: CrossEncoder) -> Scorer | PairReader:
    return Scorer(model) if model.scoring is None else PairReader(model, model.scoring)


def _check_finite(scores: np.ndarray) -> None:
    for number in np.flatnonzero(~np.isfinite(scores))[:1]:
        raise ApiError(500, f"the score of document {number} is not finite", code="not_finite", retry=False)


def _first_tokens(text: TextEncoder, documents: Sequence[str], limit: int | None) -> Sequence[str]:
    """The beginnings of documents, as long as so many tokens; None leaves them whole."""
    if limit is None:
        return documents
    encodings = text.tokenizer.backend_tokenizer.encode_batch(list(documents), add_special_tokens=False)
    ends = [found.offsets[limit - 1][1] if len(found.ids) > limit else None for found in encodings]
    return [document[:end] for document, end in zip(documents, ends, strict=True)]
