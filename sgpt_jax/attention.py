"""Attention: who sees whom, and the weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sgpt_jax.config import matmul_precision

# Far below any real score, and finite: a row without a key then gets equal weights instead of NaN.
MASKED = -1e30


def attention_mask_matrix(
    attention_mask: jax.Array, positions: jax.Array, window: int | None, segments: jax.Array | None
) -> jax.Array:
    """Which key each query sees.

    A token sees the valid tokens at or before its own place in the row. With a window it sees those less than
    `window` positions back. With segments it sees those of its own segment and of segment 0, which is how several
    queries share the document in front of them.

    Args:
        attention_mask: int or bool [B, T].
        positions: int [B, T].
        window: positions that a token sees, itself included; None for all.
        segments: int [B, T] or None.

    Returns:
        bool [B, T, S], with S = T.
    """
    length = attention_mask.shape[-1]
    seen = jnp.tril(jnp.ones((length, length), bool)) & (attention_mask != 0)[:, None, :]
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    if segments is not None:
        seen &= (segments[:, :, None] == segments[:, None, :]) | (segments == 0)[:, None, :]
    return seen


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention with grouped key/value heads; scores and softmax in float32.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], N a multiple of K: query heads [g * N/K, (g + 1) * N/K) read key head g.
        v: [B, S, K, H].
        mask: bool [B, T, S] from `attention_mask_matrix`.
        scale: factor on the products of queries and keys.
        bias: float32 [B, N, 1, S] added to the scaled scores (ALiBi), or None.
        drop: dropout for the attention weights [B, K, N/K, T, S], or None.

    Returns:
        [B, T, N, H] in the dtype of v.
    """
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    precision = matmul_precision(v.dtype)
    q = q.reshape(batch, length, groups, heads // groups, head_dim)
    scores = (
        jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    )
    if bias is not None:
        scores += bias.reshape(bias.shape[0], groups, heads // groups, 1, -1)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    if drop is not None:
        weights = drop(weights)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v, precision=precision)
    return out.reshape(batch, length, heads, head_dim)
