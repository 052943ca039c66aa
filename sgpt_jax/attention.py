"""Attention: who sees whom, and the weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sgpt_jax.products import product

# Far below any real score, and finite: a row without a key then gets equal weights instead of NaN.
MASKED = -1e30

# Queries at a time: their scores then stay in a CPU's caches, and memory does not grow with the square of the length.
QUERY_BLOCK = 128


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
    length = q.shape[1]
    step = length if drop is not None else QUERY_BLOCK
    blocks = []
    for start in range(0, length, step):
        # Later keys are never seen, see `attention_mask_matrix`.
        end = min(start + step, length)
        block = slice(start, end)
        part = _attend_block(
            q[:, block],
            k[:, :end],
            v[:, :end],
            mask[:, block, :end],
            scale,
            None if bias is None else bias[..., :end],
            drop,
        )
        blocks.append(part)
    return jnp.concatenate(blocks, axis=1)


def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    bias: jax.Array | None,
    drop: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """`attend` for some of the queries. Heads lead the products, and weights are normalised after them: the order in
    which XLA is fastest on a CPU."""
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    shape = (batch, groups, heads // groups, length)
    q = q.transpose(0, 2, 1, 3).reshape(batch, groups, -1, head_dim)  # [B, K, N/K * T, H]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, S], [B, K, S, H]
    scores = product(q, k) * scale
    scores = scores.reshape(*shape, -1)
    if bias is not None:
        scores += bias.reshape(batch, groups, heads // groups, 1, -1)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1)
    if drop is not None:
        weights = drop(weights)
    out = product(weights.astype(v.dtype).reshape(batch, groups, shape[2] * length, -1), v)
    out = out / total.reshape(batch, groups, -1, 1)
    return out.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3).astype(v.dtype)
