"""From hidden states to one vector a text."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from sgpt_jax.decoder.program import usual_promotion
from sgpt_jax.runtime.forks import check_fork

Pooling = Literal["weightedmean", "mean", "lasttoken", "cls", "max", "mean_sqrt_len_tokens"]
POOLING_MODES: tuple[str, ...] = get_args(Pooling)


def pooling_modes(pooling: str) -> list[str]:
    """The modes of a pooling: one, or several joined by "+", whose vectors stand side by side.

    Raises:
        ValueError: for an unknown mode.
    """
    modes = pooling.split("+")
    for mode in modes:
        if mode not in POOLING_MODES:
            raise ValueError(
                f"pooling must be one of {', '.join(POOLING_MODES)}, or some of them joined by +, not {pooling!r}"
            )
    return modes


@usual_promotion()
def pool(hidden: jax.Array, attention_mask: jax.Array, mode: str = "weightedmean") -> jax.Array:
    """One float32 vector a row, from its valid tokens alone, whichever side is padded.

    weightedmean gives the i-th valid token of a row the weight i over the sum of all weights (SGPT paper, section
    on position-weighted mean pooling); mean weighs all alike; lasttoken and cls take the last and the first valid
    token; max is that of each dimension; mean_sqrt_len_tokens is the sum over the square root of the count. Several
    modes are joined by "+", such as "lasttoken+mean". A row without valid tokens gives zeros.

    Args:
        hidden: [B, T, E], any float dtype.
        attention_mask: int or bool [B, T].
        mode: one of `POOLING_MODES`, or M of them joined.

    Returns:
        float32 [B, M E].

    Raises:
        ValueError: for an unknown mode.
    """
    check_fork()
    return pool_texts(hidden, attention_mask[:, None], mode)[:, 0]


def pool_texts(hidden: jax.Array, masks: jax.Array, mode: str, skip: jax.Array | int = 0) -> jax.Array:
    """`pool` for rows that hold several texts each.

    Args:
        hidden: [B, T, E], any float dtype.
        masks: int or bool [B, S, T], non-zero at the tokens of each of a row's S texts, no two of which share any.
        mode: see `pool`.
        skip: int [] or [B, S]; so many first tokens of each text are left out. The weights of weightedmean count them,
            and cls takes the first of them where no other token is left; other modes give zeros there.

    Returns:
        float32 [B, S, M E].

    Raises:
        ValueError: for an unknown mode.
    """
    modes = pooling_modes(mode)
    skip = jnp.asarray(skip)[..., None]
    valid = (masks != 0).astype(jnp.int32)
    order = jnp.cumsum(valid, axis=-1) * valid  # 1, 2, ... at valid tokens, 0 at padding
    # Where nothing is left, cls takes the text's first token, as sentence-transformers does.
    first = order == jnp.where(order.max(axis=-1, keepdims=True) > skip, skip, 0) + 1
    order = jnp.where(order > skip, order, 0)
    counts = (order > 0) | first if "cls" in modes else order > 0
    # Padding may hold anything, and 0 times infinity is not 0.
    hidden = jnp.where(counts.any(axis=1)[..., None], hidden.astype(jnp.float32), 0.0)
    vectors = [
        _largest(hidden, order) if each == "max" else _sum(hidden, _weights(order, each, first))
        for each in modes
    ]
    return jnp.concatenate(vectors, axis=-1)


def _weights(order: jax.Array, mode: str, first: jax.Array) -> jax.Array:
    """Float32 weights [B, S, T] of the tokens, from their numbers in their texts, 0 for those that do not count.

    `first` is true at the token that cls takes.
    """
    if mode == "weightedmean":
        weights = order
    elif mode == "lasttoken":
        weights = (order == jnp.max(order, axis=-1, keepdims=True)) & (order > 0)
    elif mode == "cls":
        weights = first
    else:
        weights = order > 0
    weights = weights.astype(jnp.float32)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.maximum(jnp.sqrt(total) if mode == "mean_sqrt_len_tokens" else total, 1e-9)


def _sum(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    texts = weights.shape[1]
    if texts == 1:
        # XLA turns a matmul with one row into a sum over the last axis, for which it keeps the hidden states of every
        # layer transposed on GPUs. With a second row it stays a matmul.
        weights = jnp.pad(weights, ((0, 0), (0, 1), (0, 0)))
    return jnp.einsum("bst,bte->bse", weights, hidden, precision=jax.lax.Precision.HIGHEST)[:, :texts]


def _largest(hidden: jax.Array, order: jax.Array) -> jax.Array:
    """The largest value of each dimension over each text; never [B, S, T, E] at a time."""
    texts = order.shape[1]
    owner = jnp.where((order > 0).any(axis=1), jnp.argmax(order > 0, axis=1), texts)
    largest = jax.vmap(lambda x, text: jax.ops.segment_max(x, text, num_segments=texts + 1))(hidden, owner)[
        :, :texts
    ]
    return jnp.where((order > 0).any(axis=-1, keepdims=True), largest, 0.0)


def normalize(vectors: jax.Array) -> jax.Array:
    """Vectors [..., E] scaled to length 1 in float32; zero vectors stay zero, and their gradient is finite."""
    vectors = vectors.astype(jnp.float32)
    squares = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(squares, 1e-24))  # the slope of the root at 0 is infinite


@usual_promotion()
def similarities(a: jax.Array, b: jax.Array, name: str) -> jax.Array:
    """How near vectors are: the higher, the nearer.

    Args:
        a, b: float32 [n, E] and [m, E].
        name: cosine, dot, or euclidean or manhattan, whose distances get a minus sign.

    Returns:
        float32 [n, m].
    """
    if name in ("cosine", "dot"):
        x, y = (normalize(a), normalize(b)) if name == "cosine" else (a, b)
        return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)

    def distances(row: jax.Array) -> jax.Array:
        apart = jnp.abs(row - b)
        return apart.sum(axis=-1) if name == "manhattan" else jnp.sqrt((apart * apart).sum(axis=-1))

    return -jax.lax.map(distances, a)  # never [n, m, E] at a time
