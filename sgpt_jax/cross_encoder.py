"""The cross-encoder: how probable a query is after a prompt that holds the document (SGPT-CE). No training needed."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sgpt_jax.bi_encoder import UNLIMITED_DEFAULT
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.log_probs import HEAD_ENTRIES, HEAD_POSITIONS, score_tokens
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.sharding import batch_sharding, batch_ways
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import fix_surrogates
from sgpt_jax.folder.source import resolve
from sgpt_jax.packing import shared as packing
from sgpt_jax.text.encoder import TextEncoder, check_ids
from sgpt_jax.text.pairs import DEFAULT_PROMPT, Prompt, TokenPairs, query_room, tokenise_pairs
from sgpt_jax.text.tokenizer import load_tokenizer

Reduction = Literal["sum", "mean", "search-endpoint"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

# Tokens a batch. On a CPU, small batches stay in the caches, and little of the last one is padding.
BATCH_TOKENS = {"cpu": 1024, "gpu": 32768, "tpu": 32768}


class NaNScoreError(InputError):
    """A score is NaN: the model's numbers overflow, or its weights are damaged. `index` is that of the pair."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


@dataclasses.dataclass
class ScoreReport:
    """What scoring did. Passed to several calls it adds up."""

    pairs: int = 0
    tokens: int = 0
    """Tokens that went through the decoder, padding not counted."""
    tokens_alone: int = 0
    """Tokens that one pass for each pair would have taken."""
    tokens_padded: int = 0
    """Tokens that went through the decoder, with padding."""
    documents_cut: int = 0
    """Pairs whose document was too long."""
    queries_cut: int = 0
    """Pairs whose query was too long for the room that the prompt leaves."""
    queries_empty: int = 0
    """Pairs without a query; their score is 0."""

    @property
    def tokens_saved(self) -> int:
        """Tokens that sharing documents between queries made unnecessary."""
        return self.tokens_alone - self.tokens

    def add(self, other: ScoreReport) -> None:
        """Adds another report's counts."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def warning(self) -> str | None:
        """What the user should know: how many pairs were not scored as they are; None if all were."""
        notes = [
            f"{number} {what}"
            for number, what in (
                (self.documents_cut, "with a document that is too long and lost its start"),
                (self.queries_cut, "with a query that is too long and lost its end"),
                (self.queries_empty, "with an empty query, whose score is 0"),
            )
            if number
        ]
        return f"of {self.pairs} pairs: {', '.join(notes)}" if notes else None


@dataclasses.dataclass(frozen=True, eq=False)
class CrossEncoder:
    """Scores (query, document) pairs by the query's log-probability after a prompt with the document (SGPT paper).

    Make one with `from_pretrained`. How pairs become tokens, and what is cut, is in `prompts.tokenise_pairs`.

    Attributes:
        decoder: the decoder, with a language-model head.
        text: the tokenizer; its `max_seq_length` bounds the decoder's input for one pair.
        prompt: the text around documents.
        reduction: "sum" of the query's log-probabilities (SGPT paper), their "mean", or "search-endpoint": 100 times
            (the mean minus the mean after the prompt with an empty document), the score of OpenAI's former search
            endpoint (the SGPT repository has it), to be used with `prompts.SEARCH_ENDPOINT_PROMPT`.
        name: the source's name, for reports.
        mesh: the devices it runs on, or None for the first one.
    """

    decoder: Decoder
    text: TextEncoder
    prompt: Prompt
    reduction: Reduction = "sum"
    name: str = ""
    mesh: Mesh | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *,
        prompt: str | Prompt = DEFAULT_PROMPT,
        reduction: Reduction = "sum",
        max_seq_length: int | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ) -> CrossEncoder:
        """Loads a model: a decoder of any supported family, as it was pre-trained.

        Args:
            source: a folder, a hub id, or a .gguf file.
            prompt: a template with one `{}` for the document, or a `Prompt` (few-shot: `Prompt.with_examples`). The
                default is for search. Symmetric pairs, such as duplicate questions, want another one: the SGPT
                repository has "Question Body: {} Question Title:" for Quora.
            reduction: "sum", "mean" or "search-endpoint", see the class.
            max_seq_length: tokens that the decoder reads for one pair at most; None is the model's own limit.
            dtype: "float32" or "bfloat16", for weights and matrix products; log-probabilities are float32 always.
            mesh: spread model and batches over it (`make_mesh`); None uses the first device.

        Raises:
            InputError: the source is missing, damaged, not supported or has no language-model head, or the options do
                not fit it.
        """
        resolved = resolve(source)
        decoder = load_checkpoint(open_checkpoint(resolved.path), dtype, mesh)
        length = decoder.config.max_positions or UNLIMITED_DEFAULT
        if max_seq_length is not None:
            length = max_seq_length
        return cls(
            decoder=decoder,
            text=TextEncoder(load_tokenizer(resolved.path), length),
            prompt=prompt if isinstance(prompt, Prompt) else Prompt.parse(prompt),
            reduction=reduction,
            name=resolved.name,
            mesh=mesh,
        )

    def __post_init__(self) -> None:
        limit, length = self.decoder.config.max_positions, self.text.max_seq_length
        if self.decoder.config.head == "none":
            raise InputError(
                f"{self.name or 'the checkpoint'} has no language-model head, so it cannot score queries"
            )
        if limit is not None and length > limit:
            raise InputError(f"max_seq_length {length}, but the model has {limit} positions")
        if self.reduction not in REDUCTIONS:
            raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {self.reduction!r}")
        query_room(self.text, self.prompt)

    def predict(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        share: bool = True,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        report: ScoreReport | None = None,
    ) -> np.ndarray:
        """Scores of (query, document) pairs.

        Queries of one document are packed behind it and computed in one pass, and equal pairs once; scores do not
        depend on that, nor on what else is in the call.

        Args:
            pairs: (query, document), any number, in any order.
            share: False computes every pair in a row of its own, for comparison.
            batch_tokens: padded tokens computed at a time; None picks by device.
            show_progress: None shows a bar on a terminal after a second.
            report: counts are added here.

        Returns:
            float32 [n]: by default the sum of the query's log-probabilities; 0 for an empty query.

        Raises:
            TypeError: for what is no pair of two str, naming its index.
            InputError: for a score that is NaN, naming its index.
        """
        queries, documents = _check_pairs(pairs)
        count = len(queries)
        # What the scores are compared with: each query after an empty document.
        alone = {query: count + i for i, query in enumerate(dict.fromkeys(queries))}
        if self.reduction == "search-endpoint":
            queries, documents = [*queries, *alone], documents + [""] * len(alone)
        tokens = tokenise_pairs(self.text, self.prompt, queries, documents, show_progress=show_progress)
        for ids in (tokens.contexts, tokens.queries):
            check_ids(ids, self.decoder.config.vocab_size)
        done = _count(tokens, count)
        if (warning := done.warning()) is not None:
            warnings.warn(warning, stacklevel=2)
        # The extra place at the end is where those without query tokens point to.
        sums = np.zeros(len(tokens.pairs) + 1)
        sums[:-1] = self._sums(tokens, share, batch_tokens, show_progress, done)
        if report is not None:
            report.add(done)
        scores = sums[tokens.places]
        if self.reduction != "sum":
            scores = scores / np.maximum(tokens.lengths, 1)
        if self.reduction == "search-endpoint":
            scores = 100 * (scores[:count] - scores[[alone[query] for query in queries[:count]]])
        wrong = np.flatnonzero(np.isnan(scores))
        if wrong.size:
            raise NaNScoreError(f"the score of pair {wrong[0]} is NaN", int(wrong[0]))
        return scores.astype(np.float32)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        report: ScoreReport | None = None,
    ) -> list[dict[str, Any]]:
        """Documents by their score for a query, best first; equal scores in the order given, as sentence-transformers.

        Args:
            query: the query.
            documents: the documents.
            top_k: how many to return; None for all.
            batch_tokens, show_progress, report: see `predict`.

        Returns:
            [{"corpus_id": index into documents, "score": float}].

        Raises:
            TypeError, InputError: as `predict`; the index is that of the document.
        """
        if isinstance(documents, str):
            raise TypeError("expected a list of documents, not one str")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be positive, not {top_k}")
        scores = self.predict(
            [(query, document) for document in documents],
            batch_tokens=batch_tokens,
            show_progress=show_progress,
            report=report,
        )
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [{"corpus_id": int(index), "score": float(scores[index])} for index in order]

    def _sums(
        self,
        tokens: TokenPairs,
        share: bool,
        batch_tokens: int | None,
        show_progress: bool | None,
        report: ScoreReport,
    ) -> np.ndarray:
        """The sum of log-probabilities of every pair, float64."""
        sums = np.zeros(len(tokens.pairs))
        with tqdm(
            total=len(tokens.pairs),
            unit="pair",
            desc="scoring",
            delay=1,
            disable=None if show_progress is None else not show_progress,
        ) as bar:
            # One batch behind: the host fetches a result while the device works on the next.
            waiting: tuple[packing.Pass, jax.Array] | None = None
            for started in itertools.chain(self._run(tokens, share, batch_tokens, report), [None]):
                if waiting is not None:
                    done, result = waiting
                    for numbers, scores in zip(done.pairs, np.asarray(result, np.float64), strict=True):
                        ends = np.cumsum([len(tokens.queries[tokens.pairs[number][1]]) for number in numbers])
                        if numbers:
                            sums[numbers] = np.add.reduceat(scores[: ends[-1]], [0, *ends[:-1]])
                        bar.update(len(numbers))
                waiting = started
        return sums

    def _run(
        self, tokens: TokenPairs, share: bool, batch_tokens: int | None, report: ScoreReport
    ) -> Iterator[tuple[packing.Pass, jax.Array]]:
        """Starts each batch and yields it with its log-probabilities, which may still be in the making."""
        config = self.decoder.config
        graphdef, params = split(self.decoder)
        ways = batch_ways(self.mesh)
        context_lengths, query_lengths = (list(map(len, ids)) for ids in (tokens.contexts, tokens.queries))
        rows = packing.plan_rows(tokens.pairs, context_lengths, query_lengths, config, share=share)
        budget = batch_tokens or BATCH_TOKENS.get(jax.default_backend(), 32768)
        place = jax.local_devices()[0] if self.mesh is None else batch_sharding(self.mesh)
        # Blocks of a vocabulary that is spread over devices would be gathered one by one.
        spread = self.mesh is not None and self.mesh.shape["tensor"] > 1
        entries = config.vocab_size if spread else min(HEAD_ENTRIES, config.vocab_size)
        positions = HEAD_POSITIONS.get(jax.default_backend(), 2048)
        for batch in packing.plan_batches(rows, batch_tokens=budget, row_multiple=ways):
            report.tokens_padded += batch.rows * batch.length
            work = packing.make_pass(
                batch,
                rows,
                tokens.pairs,
                tokens.contexts,
                tokens.queries,
                pad_id=self.text.pad_id,
                block=positions,
                ways=ways,
            )
            arrays = (work.input_ids, work.positions, work.segments, work.slots, work.targets)
            blocks = np.int32(-(-max(work.counts) // positions))
            report.tokens += int((work.segments >= 0).sum())
            scores = score_tokens(
                graphdef,
                params,
                *jax.device_put(arrays, place),
                blocks,
                positions_block=positions,
                entries_block=entries,
                mesh=self.mesh,
            )
            yield work, scores


def _check_pairs(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Queries and documents, with lone surrogates replaced."""
    queries, documents = [], []
    for index, pair in enumerate(pairs):
        if (
            not isinstance(pair, tuple | list)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise TypeError(f"pair {index} must be (query, document), two str, not {pair!r:.80}")
        queries.append(fix_surrogates(pair[0]))
        documents.append(fix_surrogates(pair[1]))
    return queries, documents


def _count(tokens: TokenPairs, count: int) -> ScoreReport:
    """What the first `count` pairs are; the tokens are those of all."""
    used = [
        (tokens.pairs[place], length)
        for place, length in zip(tokens.places, tokens.lengths, strict=True)
        if length
    ]
    return ScoreReport(
        pairs=count,
        tokens_alone=sum(len(tokens.contexts[context]) + int(length) - 1 for (context, _), length in used),
        documents_cut=int(tokens.documents_cut[:count].sum()),
        queries_cut=int(tokens.queries_cut[:count].sum()),
        queries_empty=int((tokens.lengths[:count] == 0).sum()),
    )
