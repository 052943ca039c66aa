"""Attention: the mask, and the weighted sum, by XLA or by cuDNN."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sgpt_jax.decoder.layers import softcap
from sgpt_jax.decoder.matmul import matmul
from sgpt_jax.decoder.sharding import RULES, platform

logger = logging.getLogger(__name__)

# Far below any real score, and finite: a query that sees no key then gets equal weights instead of NaN.
MASKED = -1e30

# Queries at a time, so that memory does not grow with the square of the length. CPU: their scores also stay in its
# caches. A GPU has no use for blocks that small, and XLA tries several programs for the matmuls of each, which doubles
# the time to compile.
QUERY_BLOCK, GPU_QUERY_BLOCK = 128, 512


def attention_mask_matrix(
    segments: jax.Array, positions: jax.Array, window: int | None, *, bidirectional: bool = False
) -> jax.Array:
    """Which key each query sees.

    A token sees itself and the tokens before it of its own segment and of segment 0; if bidirectional, those after it
    too. So several texts share a row without seeing each other, or share the prefix in front of them. Nothing sees
    padding. With a window, a token sees those less than `window` positions away.

    Args:
        segments: int [B, T]; -1 is padding.
        positions: int [B, T].
        window: tokens this far apart, or farther, do not see each other; None for no window.
        bidirectional: tokens see those after them too.

    Returns:
        bool [B, T, S], with S = T.
    """
    length = segments.shape[-1]
    of_query, of_key = segments[:, :, None], segments[:, None, :]
    seen = (of_key >= 0) & ((of_key == 0) | (of_key == of_query))
    if not bidirectional:
        seen &= jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        seen &= jnp.abs(positions[:, :, None] - positions[:, None, :]) < window
    return seen


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
    cap: float | None = None,
    causal: bool = True,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention with grouped key/value heads; scores and softmax in float32.

    In bfloat16 on an NVIDIA GPU this is cuDNN's flash attention, unless `why_not_cudnn` names a reason, which is
    then logged once. Everything else is XLA's.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], N a multiple of K: query heads [g * N/K, (g + 1) * N/K) read key head g.
        v: [B, S, K, H].
        mask: bool [B, T, S] from `attention_mask_matrix`.
        scale: factor on the dot products of queries and keys.
        bias: float32 [B, N, 1, S] added to the scaled scores (ALiBi), or None.
        cap: scaled scores s become cap * tanh(s / cap).
        causal: the mask is False for all keys after the query.
        drop: dropout for the attention weights [B, K, N/K, T, S], or None.

    Returns:
        [B, T, N, H] in the dtype of v. What a query that sees no key gets is finite, and has no meaning.
    """
    length = q.shape[1]
    # What goes on from a cache has more keys than queries, and `_attend_cudnn` pads both to one length.
    if length == k.shape[1] and v.dtype == jnp.bfloat16 and (major := _gpu_major()) is not None:
        reason = why_not_cudnn(
            major, q.shape[-1], alibi=bias is not None, capped=cap is not None, dropout=drop is not None
        )
        if reason is None:
            try:
                return _attend_cudnn(q, k, v, mask, scale, causal, cudnn_length(major, length))
            except (NotImplementedError, RuntimeError) as error:  # what JAX itself refuses, or no cuDNN
                reason = str(error)
        _say_why_not(reason)
    if drop is not None:
        step = length  # one block, as every call of `drop` would draw the same noise
    else:
        step = GPU_QUERY_BLOCK if platform() == "gpu" else QUERY_BLOCK
    blocks = []
    for start in range(0, length, step):
        block = slice(start, min(start + step, length))
        end = block.stop if causal else k.shape[1]  # keys after the block's last query are not seen
        part = _attend_block(
            q[:, block],
            k[:, :end],
            v[:, :end],
            mask[:, block, :end],
            scale,
            None if bias is None else bias[..., :end],
            cap,
            drop,
        )
        blocks.append(part)
    return jnp.concatenate(blocks, axis=1)


def why_not_cudnn(major: int, head_dim: int, *, alibi: bool, capped: bool, dropout: bool) -> str | None:
    """Why cuDNN's flash attention cannot compute `attend`, forward and backward; None where it can.

    Limits: jax/_src/cudnn/fused_attention_stablehlo.py, and NVIDIA's sdpa_support_surface.h in cudnn-frontend, which
    is narrower for gradients.

    Args:
        major: of the GPU's compute capability.
        head_dim: H.
        alibi: whether a bias is added to the scores.
        capped: whether scores are soft-capped.
        dropout: whether attention weights are dropped.
    """
    if dropout:
        return "dropout of attention weights"
    if alibi:
        return "ALiBi"
    if capped:
        return "soft-capped scores"
    if major < 8:
        return f"the GPU has compute capability {major}.x, less than 8.0"
    largest = 256 if major == 9 else 128
    if head_dim % 8 or head_dim > largest:
        return f"heads of {head_dim}, where this GPU takes multiples of 8 up to {largest}"
    return None


def cudnn_length(major: int, length: int) -> int:
    """The next length, from `length` on, at which cuDNN computes gradients, and right ones.

    Args:
        major: of the GPU's compute capability.
        length: queries and keys, T.
    """
    length += length % 2
    # On Hopper, gradients of queries whose scores are all far below 0 become NaN: pytorch/pytorch issue 196678.
    return length + 64 if major == 9 and length % 128 == 64 else length


def _gpu_major() -> int | None:
    """The major compute capability of the NVIDIA GPU that is traced for; None where it is something else.

    None too where no GPU is here and a plan is compiled for one: cuDNN's kernels cannot be made without it.
    """
    if platform() != "gpu" or jax.default_backend() != "gpu":
        return None
    major = str(jax.local_devices(backend="gpu")[0].compute_capability).partition(".")[0]
    return int(major) if major.isdigit() else None  # AMD's are names


@functools.cache  # once for each reason, not for each layer
def _say_why_not(reason: str) -> None:
    logger.warning("attention by XLA, not by cuDNN: %s", reason)


def _attend_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, causal: bool, padded: int
) -> jax.Array:
    """`attend` by cuDNN, at the length `padded`."""
    length = q.shape[1]
    if padded > length:
        extra = (0, padded - length)
        q, k, v = (jnp.pad(x, ((0, 0), extra, (0, 0), (0, 0))) for x in (q, k, v))
        mask = jnp.pad(mask, ((0, 0), extra, extra))
    # Padding sees itself here: if it saw nothing, its scores would be so low that gradients can overflow.
    sees_nothing = ~mask.any(axis=-1, keepdims=True)
    mask = (mask | (sees_nothing & jnp.eye(padded, dtype=bool)))[:, None]
    keep, mesh = None, jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # JAX shards cuDNN's call by rows and heads, but refuses queries and keys that are not sharded alike: where key
        # heads do not divide, query heads must be replicated too.
        rows, heads = (
            None if size % math.prod(mesh.shape[axis] for axis in RULES[name]) else RULES[name]
            for name, size in (("batch", q.shape[0]), ("kv_heads", k.shape[2]))
        )
        keep = functools.partial(jax.lax.with_sharding_constraint, shardings=PartitionSpec(rows, None, heads))
        q, k, v = keep(q), keep(k), keep(v)
        mask = jax.lax.with_sharding_constraint(mask, PartitionSpec(rows))
    # The mask is causal by itself; `is_causal` lets cuDNN skip the blocks above the diagonal.
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=causal, implementation="cudnn"
    )
    return (out if keep is None else keep(out))[:, :length]


def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    bias: jax.Array | None,
    cap: float | None,
    drop: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """`attend` for some of the queries.

    CPU: XLA is fastest with heads as a leading dimension of the matmuls, and with the softmax divided by its sum after
    the second one.
    """
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    shape = (batch, groups, heads // groups, length)
    q = q.transpose(0, 2, 1, 3).reshape(batch, groups, -1, head_dim)  # [B, K, N/K * T, H]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, S], [B, K, S, H]
    scores = softcap(matmul(q, k) * scale, cap)
    scores = scores.reshape(*shape, -1)
    if bias is not None:
        scores += bias.reshape(batch, groups, heads // groups, 1, -1)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1)
    if drop is not None:
        weights = drop(weights)
    out = matmul(weights.astype(v.dtype).reshape(batch, groups, shape[2] * length, -1), v)
    out = out / total.reshape(batch, groups, -1, 1)
    return out.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3).astype(v.dtype)
