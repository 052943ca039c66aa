"""Scores of pairs as a model folder itself says: read at the end of a text with both, not off the query's tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.readout import read_scores
from sgpt_jax.decoder.sharding import batch_sharding, num_shards
from sgpt_jax.errors import InputError
from sgpt_jax.folder.scoring import Scoring
from sgpt_jax.load import Parts
from sgpt_jax.packing.layout import PlannedBatch, lay_out
from sgpt_jax.packing.rows import Packing, plan_texts, texts_per_row, vector_indices
from sgpt_jax.runtime.one_behind import one_behind
from sgpt_jax.runtime.progress import Show, beside, shared_progress
from sgpt_jax.text.encoder import TextEncoder, check_ids


@dataclasses.dataclass(frozen=True, eq=False)
class OwnScoring:
    """A folder's own way to score, bound to its tokenizer and weights.

    Attributes:
        scoring: what the folder says, with the instruction that is asked for.
        readout: int32 [1] or [2], vocabulary entries, or float32 [E], a classifier's head; see `read_scores`.
        pad_id: the id that a classifier takes for padding wherever it stands, or None.
    """

    scoring: Scoring
    readout: np.ndarray
    pad_id: int | None = None

    @classmethod
    def of(cls, scoring: Scoring, parts: Parts) -> OwnScoring:
        """Binds a scoring to a loaded model.

        Raises:
            InputError: the tokenizer lacks a token that is read, or the form of the pairs does not suit it.
        """
        scoring.form.check(parts.tokenizer, scoring.prompt)
        if scoring.true is None:
            if parts.score_head is None:
                raise InputError("the checkpoint was loaded without its score head")
            return cls(scoring, parts.score_head, parts.hf_config.get("pad_token_id"))
        if parts.decoder.config.head == "none":
            raise InputError("the checkpoint has no language-model head, whose logits would be the score")
        tokens = [scoring.true] if scoring.false is None else [scoring.true, scoring.false]
        return cls(scoring, np.array([_token_id(token, parts) for token in tokens], np.int32))

    def facts(self) -> dict[str, Any]:
        """All that scores depend on besides decoder and limit, as JSON values."""
        digest = hashlib.blake2b(self.readout.tobytes(), digest_size=16).hexdigest()
        return self.scoring.facts() | {"readout": digest, "pad_id": self.pad_id}

    def index(self, ids: Sequence[int]) -> int:
        """At which of a pair's tokens the score is read.

        The last one; of a classifier the last that is no padding token, as transformers finds it, and the first where
        there is no other.
        """
        last = len(ids) - 1
        if self.pad_id is None:
            return last
        return next((index for index in range(last, -1, -1) if ids[index] != self.pad_id), 0)

    def activate(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n] after the folder's activation, float32."""
        scores = np.asarray(scores, np.float64)
        if self.scoring.activation == "sigmoid":
            scores = np.exp(-np.logaddexp(0, -scores))
        elif self.scoring.activation == "tanh":
            scores = np.tanh(scores)
        return scores.astype(np.float32)

    def shares(self, scores: np.ndarray) -> np.ndarray:
        """Activated scores [n] from 0 to 1, in the same order: a logit's as its probability."""
        if self.scoring.activation == "sigmoid":
            return scores
        return (scores + 1) / 2 if self.scoring.activation == "tanh" else np.exp(-np.logaddexp(0, -scores))


def _token_id(token: int | str, parts: Parts) -> int:
    size = parts.decoder.config.vocab_size
    id = parts.tokenizer.get_vocab().get(token) if isinstance(token, str) else token
    if id is None:
        raise InputError(f"the tokenizer has no token {token!r}, whose logit would be the score")
    if not 0 <= id < size:
        raise InputError(f"the score would be the logit of token {id}, the model has {size}")
    return id


def score_pairs(
    own: OwnScoring,
    decoder: Decoder,
    text: TextEncoder,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    mesh: Mesh | None,
    batch_tokens: int,
    batch_size: int | None,
    show_progress: Show,
) -> tuple[np.ndarray, dict[str, int]]:
    """The scores of pairs, equal ones computed once.

    Args:
        own: how they are scored.
        decoder, text, mesh: of the cross-encoder.
        queries, documents: [n] each.
        batch_tokens: padded tokens computed at a time.
        batch_size: pairs computed at a time at the most; None sets no bound of pairs.
        show_progress: see `CrossEncoder.predict`.

    Returns:
        float32 [n], and the counts of a `ScoreReport`.
    """
    numbers: dict[tuple[str, str], int] = {}
    indices = np.array(
        [numbers.setdefault(pair, len(numbers)) for pair in zip(queries, documents, strict=True)], np.int64
    )
    tokens = own.scoring.form.tokenise(
        text,
        own.scoring.prompt,
        [query for query, _ in numbers],
        [document for _, document in numbers],
        show_progress=beside(show_progress),
    )
    scores, padded = _score_ids(own, decoder, text, tokens.ids, mesh, batch_tokens, batch_size, show_progress)
    lengths = np.array([len(ids) for ids in tokens.ids], np.int64)
    counts = {
        "pairs": len(indices),
        "tokens": int(lengths.sum()),
        "tokens_alone": int(lengths[indices].sum()),
        "tokens_padded": padded,
        "documents_cut": int(tokens.documents_cut[indices].sum()),
        "queries_cut": int(tokens.queries_cut[indices].sum()),
    }
    return scores[indices], counts


def _score_ids(
    own: OwnScoring,
    decoder: Decoder,
    text: TextEncoder,
    ids: Sequence[Sequence[int]],
    mesh: Mesh | None,
    batch_tokens: int,
    batch_size: int | None,
    show_progress: Show,
) -> tuple[np.ndarray, int]:
    """The scores of token ids, float32 [n], which share rows as the texts of a bi-encoder do; and padded tokens."""
    check_ids(ids, decoder.config.vocab_size)
    packing = Packing(batch_tokens, text.max_seq_length, num_shards(mesh), batch_size)
    plans = plan_texts([len(pair) for pair in ids], packing)
    structure, params = split(decoder)
    sharding = jax.local_devices()[0] if mesh is None else batch_sharding(mesh)

    def start() -> Iterator[tuple[PlannedBatch, int, jax.Array]]:
        for plan in plans:
            room = texts_per_row(plan)
            tokens = np.zeros((plan.num_rows, room), np.int32)
            for number, row in enumerate(plan.rows):
                begin = 0
                for column, pair in enumerate(row.texts):
                    tokens[number, column] = begin + own.index(ids[pair])
                    begin += len(ids[pair])
            arrays = jax.device_put((lay_out(plan, ids, text.pad_id), tokens), sharding)
            yield plan, room, read_scores(structure, params, *arrays, own.readout, mesh=mesh)

    def fetch(started: tuple[PlannedBatch, int, jax.Array]) -> tuple[PlannedBatch, np.ndarray]:
        plan, room, found = started
        return plan, np.asarray(found).reshape(-1)[vector_indices(plan, room)]

    scores = np.zeros(len(ids), np.float32)
    with shared_progress("scoring", "pair", len(ids), show_progress) as bar:
        for plan, found in one_behind(start(), fetch):
            scores[plan.texts] = found
            bar.update(len(plan.texts))
    return own.activate(scores), sum(plan.padded_tokens for plan in plans)
