"""The cross-encoder: how probable a query is after a prompt that holds the document (SGPT-CE), without any training;
or, for a re-ranker, what its folder says.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jax.sharding import Mesh

from sgpt_jax.decoder.model import Decoder
from sgpt_jax.decoder.sharding import describe_devices
from sgpt_jax.errors import InputError, check_list, whole
from sgpt_jax.folder.scoring import Scoring, is_classifier, read_scoring
from sgpt_jax.folder.source import resolve
from sgpt_jax.habits import refuse, refuse_attribute, refuse_source, translate
from sgpt_jax.load import Parts, load_parts, open_model, token_limit
from sgpt_jax.own_scoring import OwnScoring, score_pairs
from sgpt_jax.query_scoring import batch_budget, count_pairs, log_probs_of_targets, sum_log_probs
from sgpt_jax.reports import ScoreReport
from sgpt_jax.runtime.progress import Show, beside
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.pairs import DEFAULT_PROMPT, Prompt, check_pairs, query_room, query_tokens, tokenise_pairs

Reduction = Literal["sum", "mean", "search-endpoint"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

# A tokenizer that states no limit states about 1e30.
UNSTATED = 10**9


class NaNScoreError(InputError):
    """A score is NaN: the model's activations overflow, or its weights are damaged. `index` is that of the pair."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CrossEncoder:
    """Scores (query, document) pairs by the query's log-probability after a prompt with the document (SGPT paper), or
    as a re-ranker's folder itself says.

    Make one with `from_pretrained`. How pairs become tokens, and what is cut, is in `tokenise_pairs`, and for a
    folder's own scoring in `text.templates`.

    Attributes:
        decoder: the decoder; log-probabilities and logits need its language-model head.
        text: the tokenizer; its `max_seq_length` bounds the decoder's input for one pair.
        prompt: the text around documents; None with a scoring.
        reduction: "sum" of the query's log-probabilities (SGPT paper), their "mean", or "search-endpoint": 100 times
            (the mean minus the mean after the prompt with an empty document), the score of OpenAI's former search
            endpoint (the SGPT repository has it), to be used with `SEARCH_ENDPOINT_PROMPT`.
        name: the source's name, for reports.
        mesh: the devices it runs on, or None for the first one.
        scoring: the folder's own scoring, or None for log-probabilities.
    """

    decoder: Decoder
    text: TextEncoder
    prompt: Prompt | None
    reduction: Reduction = "sum"
    name: str = ""
    mesh: Mesh | None = None
    scoring: OwnScoring | None = None

    def __new__(cls, *arguments: Any, **_: Any) -> CrossEncoder:
        refuse_source(cls, arguments)
        return super().__new__(cls)

    def __getattr__(self, name: str) -> Any:
        refuse_attribute(self, name)

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *,
        prompt: str | Prompt | None = None,
        reduction: Reduction = "sum",
        max_seq_length: int | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        weights: str | None = None,
        adapter: Any = None,
        **others: Any,
    ) -> CrossEncoder:
        """Loads a model: a decoder of any supported family, as it was pre-trained, or a re-ranker.

        Args:
            source: a folder, a hub id, or a .gguf file.
            prompt: None does what the folder says: the scoring of a re-ranker, or log-probabilities after the prompt
                for search where it says nothing. A template with one `{}` for the document, or a `Prompt` (few-shot:
                `Prompt.with_examples`), asks for log-probabilities of any folder. Symmetric pairs, such as duplicate
                questions, want another one than search: the SGPT repository has "Question Body: {} Question Title:" for
                Quora. Any other text is for a re-ranker: the name of one of its folder's prompts, or an instruction.
            reduction: "sum", "mean" or "search-endpoint", see the class.
            max_seq_length: tokens that the decoder reads for one pair at most; None is the model's own limit.
            dtype: "float32" or "bfloat16", for weights and matmuls; log-probabilities and scores are float32 always.
            mesh: spread model and batches over it (`make_mesh`); None uses the first device.
            weights: "int8" holds the matrices as int8, None in the dtype, see `load_decoder`.
            adapter: LoRA adapters to merge, see `open_model`; one with a classifier's head scores by it.

        Raises:
            InputError: the source is missing, damaged, not supported or has no language-model head, or the options do
                not fit it.
            TypeError: for an argument of sentence-transformers that means nothing here, with what to use.
        """
        refuse("from_pretrained", others)
        resolved = resolve(source)
        opened = open_model(resolved, adapter)
        if is_template(prompt):
            if is_classifier(opened.settings, opened.adapters):
                raise InputError(
                    f"{resolved.name}: a classifier has no log-probabilities: leave the prompt out"
                )
            scoring = None
        else:
            scoring = read_scoring(opened.settings, resolved.name, opened.adapters)
        if scoring is not None:
            assert not isinstance(prompt, Prompt)
            if reduction != "sum":
                raise InputError(
                    f"{resolved.name}: reduction is for log-probabilities; this is a re-ranker ({scoring.says})"
                )
            parts = load_parts(opened, dtype, mesh, weights, score_head=scoring.true is None)
            text = _pair_text(scoring, parts, max_seq_length)
            own = OwnScoring.of(scoring.asked(prompt), parts)
            return cls(parts.decoder, text, None, name=resolved.name, mesh=mesh, scoring=own)
        parts = load_parts(opened, dtype, mesh, weights)
        prompt = DEFAULT_PROMPT if prompt is None else prompt
        return cls(
            decoder=parts.decoder,
            text=TextEncoder(parts.tokenizer, token_limit(parts.decoder.config, max_seq_length)),
            prompt=prompt if isinstance(prompt, Prompt) else Prompt.parse(prompt),
            reduction=reduction,
            name=resolved.name,
            mesh=mesh,
        )

    def __post_init__(self) -> None:
        token_limit(self.decoder.config, self.text.max_seq_length)
        if self.reduction not in REDUCTIONS:
            raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {self.reduction!r}")
        if (self.prompt is None) == (self.scoring is None):
            raise InputError("a cross-encoder has either a prompt or a scoring of its own")
        if self.prompt is None:
            return
        if self.decoder.config.head == "none":
            raise InputError(
                f"{self.name or 'the checkpoint'} has no language-model head, so it cannot score queries"
            )
        if self.decoder.config.bidirectional:
            raise InputError(
                f"{self.name or 'the checkpoint'}: its tokens see those behind them, so it gives no log-probabilities"
            )
        query_room(self.text, self.prompt)

    def __repr__(self) -> str:
        config = self.decoder.config
        scored = self.scoring.scoring.describe() if self.scoring else f"log-probability, {self.reduction}"
        return (
            f"CrossEncoder({self.name or 'model'}: {config.num_layers} layers, {scored}, "
            f"{self.text.max_seq_length} tokens, {self.decoder.dtype.name} on {describe_devices(self.mesh)})"
        )

    def facts(self) -> dict[str, Any]:
        """What scores mean, as JSON values: with the same model, limit, dtype and facts they are the same."""
        if self.scoring is not None:
            return {"scoring": self.scoring.facts()}
        assert self.prompt is not None
        return {"prompt": dataclasses.asdict(self.prompt), "reduction": self.reduction}

    def predict(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        show_progress: Show = None,
        report: ScoreReport | None = None,
        **others: Any,
    ) -> np.ndarray:
        """Scores of (query, document) pairs.

        Equal pairs are computed once, and of log-probabilities the queries of one document are packed behind it and
        computed in one pass; scores do not depend on that, nor on what else is in the call.

        Args:
            pairs: (query, document), any number, in any order.
            batch_size: pairs computed at a time at the most, unless one document alone has more queries; None sets no
                bound of pairs.
            batch_tokens: padded tokens computed at a time; None picks by device.
            show_progress: None shows a bar on a terminal after a second; a caller's `Progress` is moved on.
            report: counts are added here.
            others: show_progress_bar, sentence-transformers' name, and what is the case anyway.

        Returns:
            float32 [n]: the sum of the query's log-probabilities (or what `reduction` says), 0 for an empty query; of a
            re-ranker what its folder says.

        Raises:
            TypeError: for what is no pair of two str, naming its index, and for other arguments, with what to use.
            InputError: for a score that is NaN, naming its index, and for a batch_size that is not positive.
        """
        show_progress = translate("predict", others).get("show_progress", show_progress)
        queries, documents = check_pairs(pairs)
        if self.scoring is not None:
            scores, counts = score_pairs(
                self.scoring,
                self.decoder,
                self.text,
                queries,
                documents,
                mesh=self.mesh,
                batch_tokens=batch_budget(batch_tokens),
                batch_size=batch_size,
                show_progress=show_progress,
            )
            _tell(ScoreReport(**counts), report)
            return _without_nan(scores)
        assert self.prompt is not None
        count = len(queries)
        # What the scores are compared with: each query after an empty document.
        alone = {query: count + i for i, query in enumerate(dict.fromkeys(queries))}
        if self.reduction == "search-endpoint":
            queries, documents = [*queries, *alone], documents + [""] * len(alone)
        tokens = tokenise_pairs(
            self.text, self.prompt, queries, documents, show_progress=beside(show_progress)
        )
        done = count_pairs(tokens, count)
        batches = log_probs_of_targets(
            self.decoder,
            self.text,
            tokens,
            mesh=self.mesh,
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            report=done,
        )
        shown = int(tokens.indices[:count].max(initial=-1)) + 1  # not what these are compared with
        sums = sum_log_probs(batches, len(tokens.pairs), shown=shown, show_progress=show_progress)
        sums = np.append(sums, 0)  # for those without query tokens, whose index is -1
        _tell(done, report)
        scores = sums[tokens.indices]
        if self.reduction != "sum":
            scores = scores / np.maximum(tokens.lengths, 1)
        if self.reduction == "search-endpoint":
            scores = 100 * (scores[:count] - scores[[alone[query] for query in queries[:count]]])
        return _without_nan(scores)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
        report: ScoreReport | None = None,
        **others: Any,
    ) -> list[dict[str, Any]]:
        """Documents by their score for a query, best first; equal scores in the order given, as sentence-transformers.

        Args:
            query: the query.
            documents: the documents.
            top_k: how many to return; None for all.
            return_documents: give the texts, too, as "text".
            batch_size, batch_tokens, show_progress, report, others: see `predict`.

        Returns:
            [{"corpus_id": index into documents, "score": float}].

        Raises:
            TypeError, InputError: as `predict`; the index is that of the document.
        """
        check_list("documents", documents)
        if top_k is not None and (top_k := whole("top_k", top_k)) < 1:
            raise InputError(f"top_k must be positive, not {top_k}")
        documents = list(documents)
        scores = self.predict(
            [(query, document) for document in documents],
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            show_progress=translate("rank", others).get("show_progress", show_progress),
            report=report,
        )
        order = np.argsort(-scores, kind="stable")[:top_k]
        found: list[dict[str, Any]] = [
            {"corpus_id": int(index), "score": float(scores[index])} for index in order
        ]
        if return_documents:
            found = [hit | {"text": documents[hit["corpus_id"]]} for hit in found]
        return found

    def token_log_probs(self, query: str, document: str) -> tuple[list[str], np.ndarray]:
        """How probable each token of a query is after the prompt with the document: why `predict` scores it so.

        Returns:
            The tokens as pieces of the query (see `query_tokens`), and their log-probabilities, float32 [n], whose sum
            is the score of the pair with `reduction="sum"`.

        Raises:
            TypeError: for what is no str.
            InputError: for a re-ranker, whose scores are no log-probabilities.
        """
        if self.prompt is None:
            raise InputError(f"{self.name}: a re-ranker's scores are no log-probabilities of tokens")
        queries, documents = check_pairs([(query, document)])
        tokens = tokenise_pairs(self.text, self.prompt, queries, documents, show_progress=False)
        found = [
            log_probs
            for _, log_probs in log_probs_of_targets(self.decoder, self.text, tokens, mesh=self.mesh)
        ]
        log_probs = np.concatenate([*found, np.zeros(0)]).astype(np.float32)
        return query_tokens(self.text, self.prompt, query), log_probs


def _pair_text(scoring: Scoring, parts: Parts, asked: int | None) -> TextEncoder:
    """The tokenizer of a re-ranker, with the limit that is asked for, or that folder and tokenizer state."""
    stated = scoring.max_seq_length or min(parts.tokenizer.model_max_length, UNSTATED)
    text = TextEncoder(parts.tokenizer, token_limit(parts.decoder.config, asked, stated))
    usual = scoring.form.usual_limit(text)
    if asked is None and usual is not None and usual < text.max_seq_length:
        return TextEncoder(parts.tokenizer, usual)
    return text


def is_template(prompt: str | Prompt | None) -> bool:
    """Whether a prompt asks for log-probabilities: a re-ranker's instruction has no `{}`."""
    return isinstance(prompt, Prompt) or (prompt is not None and "{}" in prompt)


def _tell(done: ScoreReport, report: ScoreReport | None) -> None:
    """Warns the caller of `predict`, and adds to its report."""
    if (warning := done.warning()) is not None:
        warnings.warn(warning, stacklevel=3)
    if report is not None:
        report.add(done)


def _without_nan(scores: np.ndarray) -> np.ndarray:
    """Scores [n] as float32; a NaN is an error."""
    wrong = np.flatnonzero(np.isnan(scores))
    if wrong.size:
        raise NaNScoreError(f"the score of pair {wrong[0]} is NaN", int(wrong[0]))
    return scores.astype(np.float32)
