"""The programs of a search whose vectors stay on the devices: local top-k, block by block, and a merge of devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sgpt_jax.index.topk import CHUNK, chunk_top_k

FEW = 32  # chunks of a block that are looked into where no more can matter


def split_in_three(values: np.ndarray) -> np.ndarray:
    """Float32 as a sum of three bfloat16, [3, ...]: 24 bits in three times 8. Exact but for numbers near 0."""
    parts = []
    for _ in range(3):
        part = values.astype(ml_dtypes.bfloat16)
        parts.append(part)
        values = values - part.astype(np.float32)
    return np.stack(parts)


def _products(parts: jax.Array, vectors: jax.Array) -> jax.Array:
    """Parts of queries [1 or 3, Q, E] with vectors [B, E]: [Q, B] float32 at full precision.

    Three parts are bfloat16, and so are vectors then: bfloat16 and int8 are exact in it, so three passes of a matrix
    unit give what float32 gives in six. The vectors are read once for all parts.
    """
    number, count, dimension = parts.shape
    products = jax.lax.dot_general(
        parts.reshape(number * count, dimension),
        vectors.astype(parts.dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if number == 1 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    ).reshape(number, count, -1)
    return products[0] if number == 1 else (products[2] + products[1]) + products[0]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def nothing(mesh: Mesh, devices: int, count: int, kept: int) -> tuple[jax.Array, jax.Array]:
    """Scores and rows [D, Q, kept] before any block was looked at."""
    sharding = NamedSharding(mesh, P("rows"))
    empty = (
        jnp.full((devices, count, kept), -jnp.inf, jnp.float32),
        jnp.full((devices, count, kept), -1, jnp.int32),
    )
    return jax.lax.with_sharding_constraint(empty, (sharding, sharding))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def look(mesh, best, parts, offsets, vectors, factors, position):
    """The best of each device, [D, Q, kept], with one more block looked at.

    ``position`` is the block's first row on its device, the rows of a device, and the rows of the index.
    """

    def local(best, parts, offsets, vectors, factors, position):
        scores = _products(parts, vectors)
        if factors is not None:
            scores = scores * factors + offsets[:, None]
        start = jax.lax.axis_index("rows") * position[1] + position[0]
        columns = jnp.arange(vectors.shape[0], dtype=jnp.int32)
        # -0.0 is 0.0, which top_k would put first; rows behind the last one are padding.
        scores = jnp.where(scores == 0, 0.0, scores)
        scores = jnp.where(start + columns < position[2], scores, -jnp.inf)
        old_scores, old_rows = best[0][0], best[1][0]
        kept = old_scores.shape[1]
        maxima = scores.reshape(scores.shape[0], -1, CHUNK).max(axis=2)

        def merged(chunks):
            new_scores, found = chunk_top_k(scores, maxima, kept, chunks)
            both = jnp.concatenate([old_scores, new_scores], axis=1)
            top, order = jax.lax.top_k(both, kept)
            rows = jnp.concatenate([old_rows, found + start], axis=1)
            return top, jnp.take_along_axis(rows, order, axis=1)

        # NaN must not be passed over: it makes `most` large.
        most = (~(maxima <= old_scores[:, -1:])).sum(axis=1).max()
        case = jnp.where(most == 0, 0, jnp.where(most <= FEW, 1, 2))
        top = jax.lax.switch(
            case, [lambda: (old_scores, old_rows), lambda: merged(FEW), lambda: merged(maxima.shape[1])]
        )
        return top[0][None], top[1][None]

    by_row = P("rows")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=((by_row, by_row), P(), P(), by_row, by_row, P()),
        out_specs=(by_row, by_row),
    )(best, parts, offsets, vectors, factors, position)


@partial(jax.jit, static_argnums=0)
def merge_devices(mesh: Mesh, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The best of all devices [Q, kept]: each device gets all devices' best of its share of the queries.

    All devices have them in the end, as the devices of other processes cannot be read.
    """

    def local(scores, rows):
        scores, rows = (jax.lax.all_to_all(part[0], "rows", 0, 1, tiled=True) for part in (scores, rows))
        top, order = jax.lax.top_k(scores, best[0].shape[2])
        return top, jnp.take_along_axis(rows, order, axis=1)

    by_row = P("rows")
    merged = jax.shard_map(local, mesh=mesh, in_specs=(by_row, by_row), out_specs=(by_row, by_row))(*best)
    replicated = NamedSharding(mesh, P())
    return jax.lax.with_sharding_constraint(merged, (replicated, replicated))
