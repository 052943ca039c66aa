"""GradCache: a batch of any size in the memory of one chunk, with the gradient of the whole batch.

Encoding runs as a scan over chunks of rows, and nothing of a chunk is kept for the backward pass but its
input: XLA encodes every chunk once more when it goes backwards. The loss between the two passes sees all
vectors, so loss and gradient are those of the unchunked step (the idea is GradCache of Gao et al. 2021, the
form that of luyug/GradCache's `cachex`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def encode_in_chunks(encode: Callable[[Any, Any], Array], params: Any, rows: Any, chunk_size: int) -> Array:
    """Encodes rows chunk by chunk, with the memory of one chunk.

    Args:
        encode: pure function of (params, rows) that treats every row by itself; `[r, ...]` in, `[r, ...]`
            out.
        params: pytree, the same for every chunk; differentiable.
        rows: pytree of arrays `[R, ...]`: tokens, and for dropout one random key a row, so that the noise
            does not depend on the chunks.
        chunk_size: rows at a time; 0, or R and more, encodes all rows at once and keeps what the backward
            pass needs. It need not divide R: the last chunk is filled with copies of the first rows, whose
            results are dropped.

    Returns:
        `encode`'s result for all rows, `[R, ...]`.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    if chunk_size < 0:
        raise ValueError(f"chunk size must not be negative, not {chunk_size}")
    if chunk_size == 0 or chunk_size >= count:
        return encode(params, rows)
    chunks = -(-count // chunk_size)
    surplus = jnp.arange(chunks * chunk_size) % count

    def split(leaf: Array) -> Array:
        if chunks * chunk_size != count:
            leaf = leaf[surplus]
        # Row r becomes row r // chunks of chunk r % chunks. So a device that holds a contiguous block of rows
        # holds the same rows of every chunk, and splitting moves nothing between devices.
        return jnp.moveaxis(leaf.reshape(chunk_size, chunks, *leaf.shape[1:]), 1, 0)

    one = jax.checkpoint(encode, policy=jax.checkpoint_policies.nothing_saveable)
    _, vectors = jax.lax.scan(lambda _, chunk: (None, one(params, chunk)), None, jax.tree.map(split, rows))
    vectors = jnp.moveaxis(vectors, 0, 1)  # [chunk_size, chunks, ...]
    return vectors.reshape(chunks * chunk_size, *vectors.shape[2:])[:count]
