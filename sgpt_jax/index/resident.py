"""Exact search of vectors that stay on the devices of a mesh, each of which holds a share of the rows.

Every device finds the best of its own rows, block by block, so that no more than the scores of one block are ever in
memory; then the devices exchange these, so that each merges those of some queries. What is held with fewer bits than
is stored proposes candidates, whose scores then come from the stored rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sgpt_jax.errors import InputError
from sgpt_jax.index.columns import calibrate, quantize
from sgpt_jax.index.topk import CHUNK, MAX_QUERIES, Ids, chunk_top_k, in_order, padded_count
from sgpt_jax.runtime.memory import free_memory
from sgpt_jax.runtime.platform import by_platform

logger = logging.getLogger(__name__)

ResidentDtype = Literal["float32", "bfloat16", "int8"]
RESIDENT: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}

# Elements of a block on one device. Small on a CPU, whose caches should hold the scores; on an accelerator large enough
# for reading it to take longer than starting the program.
CPU_ELEMENTS, ACCELERATOR_ELEMENTS = 1 << 23, 1 << 27

FEW = 32  # chunks of a block that are looked into where no more can matter
LEAST_CANDIDATES = 64  # so that their errors say something of the others'
_CALIBRATION_ROWS = 1 << 14


@dataclass(frozen=True)
class Source:
    """The stored rows.

    Attributes:
        count: how many.
        dimension: of a vector.
        dtype: how they are stored.
        calibration: of int8, [2, E] float32.
        vectors: rows -> float32 [n, E].
        codes: rows -> what is stored of int8: codes [n, E] and the factor of each, float32 [n].
    """

    count: int
    dimension: int
    dtype: str
    calibration: np.ndarray | None
    vectors: Callable[[np.ndarray], np.ndarray]
    codes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Resident:
    """The rows of an index on the devices of a mesh. Make one with `load`."""

    def __init__(self, source: Source, mesh: Mesh, dtype: ResidentDtype, layout: tuple[int, int]) -> None:
        """Puts the rows on the devices; ``layout`` is (blocks a device, rows a block)."""
        self.dtype = dtype
        self._source, self._mesh, self._layout = source, mesh, layout
        self._calibration = None
        if dtype == "int8":
            self._calibration = source.calibration
            if self._calibration is None:
                self._calibration = calibrate(source.vectors(np.arange(min(source.count, _CALIBRATION_ROWS))))
        same = dtype == "int8" and source.dtype == "int8"
        self.exact = dtype == "float32" or same
        # Over all rows, the largest length of what the held vector lacks, and of the vector itself.
        self._largest_error = self._largest_norm = 0.0
        self._three_parts = dtype != "float32" and mesh.devices.flat[0].platform != "cpu"
        self._blocks = [self._put_block(number) for number in range(layout[0])]

    @classmethod
    def load(cls, source: Source, mesh: Mesh | None, dtype: ResidentDtype, name: str) -> Resident | None:
        """Puts the rows on the devices, or says why they do not fit.

        Args:
            source: the rows.
            mesh: over whose devices the rows are sharded, whatever its axes; None for the first device.
            dtype: how they are held.
            name: of the index, for the message.

        Returns:
            None, after a message with the arithmetic, where they do not fit.

        Raises:
            InputError: an unknown dtype, devices of other processes, or damaged vectors.
        """
        if dtype not in RESIDENT:
            raise InputError(f"resident must be one of {', '.join(RESIDENT)}, not {dtype!r}")
        devices = [jax.local_devices()[0]] if mesh is None else list(mesh.devices.flat)
        if any(device.process_index != jax.process_index() for device in devices):
            raise InputError("an index is held on the devices of one process; the mesh has those of others")
        elements = by_platform(cpu=CPU_ELEMENTS, accelerator=ACCELERATOR_ELEMENTS)
        share = -(-source.count // len(devices))
        blocks = max(1, -(-share * source.dimension // elements))
        rows = -(-share // (blocks * CHUNK)) * CHUNK
        row_bytes = source.dimension * RESIDENT[dtype].itemsize + (4 if dtype == "int8" else 0)
        held = blocks * rows * row_bytes
        # Scores of the most queries in three parts, of one block, and a block that is being converted.
        scratch = 4 * MAX_QUERIES * rows * 4 + rows * source.dimension * 4
        free = min(
            free_memory(device) // (len(devices) if device.platform == "cpu" else 1) for device in devices
        )
        if held + scratch > free or blocks * rows * len(devices) >= 2**31:
            logger.warning(
                "%s: as %s on %d devices, each would hold %d rows of %d bytes, %.2f GB, and %.2f GB beside them while "
                "it searches, of %.2f GB that are free (and rows are counted up to 2**31): the index is searched in "
                "blocks from disk, with the same results",
                name, dtype, len(devices), blocks * rows, row_bytes, held / 1e9, scratch / 1e9, free / 1e9,
            )  # fmt: skip
            return None
        return cls(source, Mesh(np.array(devices), ("rows",)), dtype, (blocks, rows))

    def search(
        self,
        queries: np.ndarray,
        k: int,
        ids: Ids,
        otherwise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query, as `Index.search` returns them.

        Args:
            queries: float32 [Q, E], scaled to length 1 where the similarity is cosine.
            k: at most the number of rows.
            ids: the ids of some rows, asked for where scores are equal.
            otherwise: searches the queries of the given numbers in another exact way: those with more rows at the cut
                than there are ranks, and those whose candidates are not sure to hold the k best.

        Raises:
            InputError: a score is NaN or infinite.
        """
        parts = np.array_split(queries, max(1, -(-len(queries) // MAX_QUERIES)))
        kept = k + 1 if self.exact else min(self._source.count, max(4 * k, LEAST_CANDIDATES))
        started = [self._start(part, kept) for part in parts]
        scores = np.concatenate(
            [np.asarray(found)[: len(part)] for (found, _), part in zip(started, parts, strict=True)]
        )
        rows = np.concatenate(
            [np.asarray(found)[: len(part)] for (_, found), part in zip(started, parts, strict=True)]
        )
        if not np.isfinite(scores[:, : min(kept, self._source.count)]).all():
            raise InputError("the vectors are too large or damaged: a score is NaN or infinite")
        if self.exact:
            unsure = (scores[:, k - 1] == scores[:, k]) & np.isfinite(scores[:, k])
            scores, rows = scores[:, :k].copy(), rows[:, :k].astype(np.int64)
        else:
            scores, rows, unsure = self._rescored(queries, scores, rows.astype(np.int64), k)
        in_order(scores, rows, ids)
        again = np.flatnonzero(unsure)
        if len(again):
            scores[again], rows[again] = otherwise(again)
        return scores, rows

    def _put_block(self, number: int) -> tuple[jax.Array, jax.Array | None]:
        """One block of every device: vectors [D * B, E] and for int8 their factors [D * B], sharded over rows."""
        blocks, size = self._layout
        vectors, factors = [], []
        for position, device in enumerate(self._mesh.devices.flat):
            start = (position * blocks + number) * size
            rows = np.arange(min(start, self._source.count), min(start + size, self._source.count))
            held = np.zeros((size, self._source.dimension), RESIDENT[self.dtype])
            scales = np.zeros(size, np.float32)
            if len(rows):
                self._convert(rows, held[: len(rows)], scales[: len(rows)])
            vectors.append(jax.device_put(held, device))
            factors.append(jax.device_put(scales, device))
        sharding = NamedSharding(self._mesh, P("rows"))
        total = len(vectors) * size
        joined = jax.make_array_from_single_device_arrays((total, self._source.dimension), sharding, vectors)
        if self._calibration is None:
            return joined, None
        return joined, jax.make_array_from_single_device_arrays((total,), sharding, factors)

    def _convert(self, rows: np.ndarray, held: np.ndarray, factors: np.ndarray) -> None:
        """Writes what is held of some rows, and notes what that lacks."""
        if self.exact and self.dtype == "int8":
            held[:], factors[:] = self._source.codes(rows)
            return
        vectors = self._source.vectors(rows)
        if self.dtype == "int8":
            assert self._calibration is not None
            held[:], factors[:] = quantize(vectors, self._calibration)
            mean, scale = self._calibration
            back = mean + scale * held.astype(np.float32) * factors[:, None]
        else:
            held[:] = vectors
            back = held.astype(np.float32)
        if not self.exact:
            for what, name in ((vectors - back, "_largest_error"), (vectors, "_largest_norm")):
                longest = float(np.sqrt(np.square(what, dtype=np.float64).sum(axis=1)).max())
                setattr(self, name, max(getattr(self, name), longest))

    def _start(self, queries: np.ndarray, kept: int) -> tuple[jax.Array, jax.Array]:
        """Starts the search for some queries: scores and rows [padded Q, kept], best first, -inf where none is."""
        devices = self._mesh.devices.size
        count = -(-padded_count(len(queries)) // devices) * devices
        queries = np.pad(queries, ((0, count - len(queries)), (0, 0)))
        offsets = np.zeros(count, np.float32)
        if self._calibration is not None:
            mean, scale = self._calibration
            offsets, queries = queries @ mean, queries * scale
        parts = split_in_three(queries) if self._three_parts else queries[None]
        replicated = NamedSharding(self._mesh, P())
        parts, offsets = jax.device_put(parts, replicated), jax.device_put(offsets, replicated)
        best = _nothing(self._mesh, devices, count, kept)
        blocks, size = self._layout
        for number, (vectors, factors) in enumerate(self._blocks):
            position = np.array([number * size, blocks * size, self._source.count], np.int32)
            best = _look(self._mesh, best, parts, offsets, vectors, factors, position)
        return _merge_devices(self._mesh, best)

    def _rescored(
        self, queries: np.ndarray, found: np.ndarray, rows: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best of the candidates [Q, m] by their stored vectors, and which queries are unsure [Q].

        A row that is no candidate scores at most the last candidate's held score and the error of its own. That error
        is at most the query's length times the largest error of a vector; it is taken to be also at most twice the
        largest that the query's candidates have, 64 or more of them.
        """
        result_scores, result_rows = (
            np.empty((len(queries), k), np.float32),
            np.empty((len(queries), k), np.int64),
        )
        unsure = np.zeros(len(queries), bool)
        everything = rows.shape[1] == self._source.count
        for number, query in enumerate(queries.astype(np.float64)):
            exact = self._source.vectors(rows[number]).astype(np.float64) @ query
            scores = exact.astype(np.float32) + np.float32(0)  # -0.0 is 0.0
            order = np.lexsort((rows[number], -scores))[:k]
            level = float(scores[order[-1]])
            result_scores[number], result_rows[number] = scores[order], rows[number][order]
            length = float(np.linalg.norm(query))
            errors = np.abs(exact - found[number])
            slack = (
                min(length * self._largest_error, 2 * float(errors.max()))
                + 1e-6 * length * self._largest_norm
            )
            unsure[number] = (scores == level).sum() > (result_scores[number] == level).sum()
            unsure[number] |= not everything and level <= float(found[number, -1]) + slack
        return result_scores, result_rows, unsure


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
def _nothing(mesh: Mesh, devices: int, count: int, kept: int) -> tuple[jax.Array, jax.Array]:
    sharding = NamedSharding(mesh, P("rows"))
    empty = jnp.full((devices, count, kept), -jnp.inf), jnp.full((devices, count, kept), -1, jnp.int32)
    return jax.lax.with_sharding_constraint(empty, (sharding, sharding))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _look(mesh, best, parts, offsets, vectors, factors, position):
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
def _merge_devices(mesh: Mesh, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The best of all devices [Q, kept]: each device gets all devices' best of its share of the queries."""

    def local(scores, rows):
        scores, rows = (jax.lax.all_to_all(part[0], "rows", 0, 1, tiled=True) for part in (scores, rows))
        top, order = jax.lax.top_k(scores, best[0].shape[2])
        return top, jnp.take_along_axis(rows, order, axis=1)

    by_row = P("rows")
    return jax.shard_map(local, mesh=mesh, in_specs=(by_row, by_row), out_specs=(by_row, by_row))(*best)
