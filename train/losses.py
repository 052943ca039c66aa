"""The training losses, written once for the global batch.

The arrays are global: with a mesh the rows of `queries`, `positives` and `negatives` live on many devices,
and XLA inserts whatever communication the matrix product needs. Everything here is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from sgpt_jax.decoder.pooling import normalize

DISTILLATIONS = ("margin", "kl")


@dataclass(frozen=True)
class LossConfig:
    """What the loss is made of.

    Attributes:
        scale: factor on the cosine, the inverse temperature (20 in the SGPT paper).
        both_directions: also classify each positive's query among all queries, and average the two losses.
        matryoshka: leading vector sizes that must work alone; the loss is averaged over them. Empty: the
            whole vector.
        distill: None, "margin" (squared error of score margins) or "kl" (of the score distributions), from
            given scores.
        distill_weight: what the distillation loss is multiplied by before it is added to the contrastive
            loss.
        near: with given scores, a hard negative that scores above its positive's score minus this is no negative of
            the contrastive loss, wherever its text stands in the batch; None: all are.
    """

    scale: float = 20.0
    both_directions: bool = False
    matryoshka: tuple[int, ...] = ()
    distill: str | None = None
    distill_weight: float = 1.0
    near: float | None = None

    def __post_init__(self) -> None:
        if self.distill is not None and self.distill not in DISTILLATIONS:
            raise ValueError(f"distill must be one of {', '.join(DISTILLATIONS)}, not {self.distill!r}")
        if any(size < 1 for size in self.matryoshka):
            raise ValueError(f"matryoshka sizes must be positive, not {self.matryoshka}")
        if self.near is not None and self.distill is None:
            raise ValueError("near is for scores that are fitted: it needs distill")


def same_text(left: Array, right: Array) -> Array:
    """Compares text identities, integers `[n, 2]` and `[m, 2]` (halves of a 64-bit hash): bool `[n, m]`."""
    return jnp.all(left[:, None, :] == right[None, :, :], axis=-1)


def _not_negatives(query_ids: Array, positive_ids: Array, candidate_ids: Array) -> Array:
    """Tells which candidates must not be negatives of which query: bool `[B, C]`.

    That is every copy of the query itself, and of any positive that the batch gives for the same query text.
    A row's own positive is among them.
    """
    same_query = same_text(query_ids, query_ids).astype(jnp.float32)  # [B, B]
    is_positive = same_text(positive_ids, candidate_ids).astype(jnp.float32)  # [B, C]
    return (same_query @ is_positive > 0) | same_text(query_ids, candidate_ids)


def _classify(left: Array, right: Array, ignored: Array, scale: float) -> Array:
    """Mean cross-entropy of picking row i of `right` for row i of `left`; `ignored` [B, C] drops others."""
    logits = scale * jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)  # [B, C]
    own = jnp.eye(logits.shape[0], logits.shape[1], dtype=bool)
    logits = jnp.where(ignored & ~own, -jnp.inf, logits)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.diagonal(logits))


def contrastive_loss(
    queries: Array,
    positives: Array,
    negatives: Array,
    ids: tuple[Array, Array, Array],
    negative_mask: Array,
    *,
    scale: float = 20.0,
    both_directions: bool = False,
    near_mask: Array | None = None,
) -> Array:
    """In-batch and hard negatives: cross-entropy of `scale * cosine` over all candidates of the batch.

    The candidates of every query are all positives, then all hard negatives (SGPT repository,
    MultipleNegativesRankingLoss). A candidate that has the same text as the query, or as a positive of the
    same query, is left out unless it is the row's own positive: it is never pushed away.

    Args:
        queries: float `[B, E]`.
        positives: float `[B, E]`.
        negatives: float `[B, K, E]`; K may be 0.
        ids: text identities of queries `[B, 2]`, positives `[B, 2]` and negatives `[B, K, 2]`.
        negative_mask: bool `[B, K]`, False where an example has fewer than K negatives.
        scale: factor on the cosine.
        both_directions: average with the loss of picking the query of each positive among all queries.
        near_mask: bool `[B, K]`: hard negatives that are too good to be pushed away from their query.

    Returns:
        float32 scalar.
    """
    query_ids, positive_ids, negative_ids = ids
    batch, count, size = negatives.shape
    queries, positives = normalize(queries), normalize(positives)
    candidates = jnp.concatenate([positives, normalize(negatives).reshape(batch * count, size)])
    candidate_ids = jnp.concatenate([positive_ids, negative_ids.reshape(batch * count, 2)])
    absent = jnp.concatenate([jnp.zeros(batch, bool), ~negative_mask.reshape(-1)])
    ignored = _not_negatives(query_ids, positive_ids, candidate_ids) | absent[None, :]
    if near_mask is not None:
        same = same_text(negative_ids.reshape(batch * count, 2), candidate_ids)
        same = same.reshape(batch, count, len(candidate_ids))  # no -1: count may be 0
        ignored |= jnp.any(same & near_mask[..., None], axis=1)
    loss = _classify(queries, candidates, ignored, scale)
    if both_directions:
        ignored = _not_negatives(positive_ids, query_ids, query_ids)
        loss = (loss + _classify(positives, queries, ignored, scale)) / 2
    return loss


def distillation_loss(
    queries: Array,
    positives: Array,
    negatives: Array,
    scores: Array,
    negative_mask: Array,
    *,
    kind: str,
    scale: float = 20.0,
) -> Array:
    """Fits `scale * cosine` of a query with its own documents to a teacher's scores.

    Args:
        queries, positives, negatives, negative_mask: as in `contrastive_loss`.
        scores: float `[B, 1 + K]`, the teacher's score of the positive and of each negative.
        kind: "margin" (mean squared error of positive minus negative: MarginMSE) or "kl"
            (Kullback-Leibler divergence of the teacher's softmax from ours, mean over the batch).
        scale: factor on the cosine.

    Returns:
        float32 scalar; 0 for a batch without negatives.
    """
    documents = jnp.concatenate([positives[:, None], negatives], axis=1)  # [B, 1 + K, E]
    own = jnp.einsum(
        "be,bke->bk", normalize(queries), normalize(documents), precision=jax.lax.Precision.HIGHEST
    )
    own, scores = scale * own, scores.astype(jnp.float32)
    present = jnp.concatenate([jnp.ones_like(negative_mask[:, :1]), negative_mask], axis=1)
    if kind == "margin":
        error = (own[:, :1] - own) - (scores[:, :1] - scores)
        return jnp.sum(jnp.where(negative_mask, error[:, 1:] ** 2, 0)) / jnp.maximum(
            jnp.sum(negative_mask), 1
        )
    ours = jax.nn.log_softmax(jnp.where(present, own, -1e9))
    teacher = jax.nn.log_softmax(jnp.where(present, scores, -1e9))
    return jnp.mean(jnp.sum(jnp.where(present, jnp.exp(teacher) * (teacher - ours), 0), axis=-1))


def _repeated(positive_ids: Array, negative_ids: Array, negative_mask: Array, order: Array) -> Array:
    """Tells which negatives have a text that stands before among the batch's candidates: bool `[B, K]`.

    Before a negative stand all positives, and the negatives that one process has before it: copies of a text may differ
    in case or white space, so that it matters which of them counts, on several processes too.
    """
    batch, count = negative_mask.shape
    ids, present = negative_ids.reshape(batch * count, 2), negative_mask.reshape(-1)
    places = (order[:, None] * count + jnp.arange(count)).reshape(-1)
    before = same_text(ids, ids) & present & (places < places[:, None])
    return (jnp.any(same_text(ids, positive_ids), axis=1) | jnp.any(before, axis=1)).reshape(batch, count)


def total_loss(config: LossConfig, queries: Array, positives: Array, negatives: Array, batch: dict) -> Array:
    """The loss of one global batch as `config` describes it.

    Args:
        config: what to add up.
        queries, positives, negatives: float `[B, E]`, `[B, E]`, `[B, K, E]`.
        batch: `ids` (three arrays), `negative_mask` and, for distillation, `scores`: see the functions above;
            `order`, int32 `[B]`: the place of each row's example in the batch. A negative's text counts once in the
            contrastive loss, however many lists it is in: where it stands first.

    Returns:
        float32 scalar.
    """
    mask = batch["negative_mask"]
    near = None
    if config.near is not None:
        near = mask & (batch["scores"][:, 1:] > batch["scores"][:, :1] - config.near)
    first = mask & ~_repeated(batch["ids"][1], batch["ids"][2], mask, batch["order"])
    terms = []
    for size in config.matryoshka or (queries.shape[-1],):
        vectors = (queries[..., :size], positives[..., :size], negatives[..., :size])
        term = contrastive_loss(
            *vectors,
            batch["ids"],
            first,
            scale=config.scale,
            both_directions=config.both_directions,
            near_mask=near,
        )
        if config.distill:
            extra = distillation_loss(
                *vectors, batch["scores"], mask, kind=config.distill, scale=config.scale
            )
            term = term + config.distill_weight * extra
        terms.append(term)
    return jnp.mean(jnp.stack(terms))
