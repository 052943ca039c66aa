"""From hidden states to one vector a text."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Pooling = Literal["weightedmean", "mean", "lasttoken", "cls"]
POOLING_MODES: tuple[str, ...] = get_args(Pooling)


def pool(hidden: jax.Array, attention_mask: jax.Array, mode: str = "weightedmean") -> jax.Array:
    """One float32 vector a row, from its valid tokens alone, whichever side is padded.

    weightedmean gives the i-th valid token of a row the weight i over the sum of all weights (SGPT paper, section
    on position-weighted mean pooling); mean weighs all alike; lasttoken and cls take the last and the first valid
    token. A row without valid tokens gives zeros.

    Args:
        hidden: [B, T, E], any float dtype.
        attention_mask: int or bool [B, T].
        mode: one of `POOLING_MODES`.

    Returns:
        float32 [B, E].

    Raises:
        ValueError: for an unknown mode.
    """
    return pool_texts(hidden, attention_mask[:, None], mode)[:, 0]


def pool_texts(hidden: jax.Array, masks: jax.Array, mode: str) -> jax.Array:
    """`pool` for rows that hold several texts each.

    Args:
        hidden: [B, T, E], any float dtype.
        masks: int or bool [B, S, T], non-zero at the tokens of each of a row's S texts.
        mode: one of `POOLING_MODES`.

    Returns:
        float32 [B, S, E].

    Raises:
        ValueError: for an unknown mode.
    """
    valid = (masks != 0).astype(jnp.int32)
    order = jnp.cumsum(valid, axis=-1) * valid  # 1, 2, ... at valid tokens, 0 at padding
    if mode == "weightedmean":
        weights = order
    elif mode == "mean":
        weights = valid
    elif mode == "lasttoken":
        weights = (order == jnp.max(order, axis=-1, keepdims=True)) & (order > 0)
    elif mode == "cls":
        weights = order == 1
    else:
        raise ValueError(f"pooling must be one of {', '.join(POOLING_MODES)}, not {mode!r}")
    weights = weights.astype(jnp.float32)
    weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-9)
    # Padding may hold anything, and 0 times infinity is not 0.
    hidden = jnp.where(valid.any(axis=1)[..., None], hidden.astype(jnp.float32), 0.0)
    texts = weights.shape[1]
    if texts == 1:
        # XLA turns a matmul with one row into a sum over the last axis, for which it keeps the hidden states of every
        # layer transposed on GPUs. With a second row it stays a matmul.
        weights = jnp.pad(weights, ((0, 0), (0, 1), (0, 0)))
    return jnp.einsum("bst,bte->bse", weights, hidden, precision=jax.lax.Precision.HIGHEST)[:, :texts]


def normalize(vectors: jax.Array) -> jax.Array:
    """Vectors [..., E] scaled to length 1 in float32; zero vectors stay zero."""
    vectors = vectors.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(vectors * vectors, axis=-1, keepdims=True))
    return vectors / jnp.maximum(norms, 1e-12)
