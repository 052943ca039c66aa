"""Exact search of an index whose vectors stay on the devices of a mesh.

What is held there with fewer bits than is stored proposes candidates, whose scores then come from the stored rows.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sgpt_jax.errors import InputError
from sgpt_jax.index.columns import calibrate, quantize
from sgpt_jax.index.held import HELD, Held, HeldDtype, Layout, block_sizes
from sgpt_jax.index.topk import MAX_QUERIES, Ids, in_order
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.memory import free_memory

logger = logging.getLogger(__name__)

LEAST_CANDIDATES = 64  # so that their errors say something of the others'
_CALIBRATION_ROWS = 1 << 14
_CONVERTED = 1 << 24  # elements at a time, which take some 22 bytes each on the host


@dataclass(frozen=True)
class Source:
    """The stored rows, by their positions from 0: removed ones are not among them.

    Attributes:
        count: how many.
        dimension: of a vector.
        dtype: how they are stored.
        calibration: of int8, [2, E] float32.
        vectors: positions -> float32 [n, E].
        codes: positions -> what is stored of int8: codes [n, E] and the factor of each, float32 [n].
        rows: positions -> rows of the index, both ascending.
    """

    count: int
    dimension: int
    dtype: str
    calibration: np.ndarray | None
    vectors: Callable[[np.ndarray], np.ndarray]
    codes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    rows: Callable[[np.ndarray], np.ndarray]


class Resident:
    """The rows of an index on the devices of a mesh. Make one with `load`.

    Of several processes, each holds the rows of its own devices; all of them search at the same time.
    """

    def __init__(self, source: Source, mesh: Mesh, dtype: HeldDtype, layout: Layout) -> None:
        """Puts the rows on the devices."""
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
        self._held = Held(mesh, dtype, source.count, layout, self._put_block, self._calibration)
        lengths = processes.gather([self._largest_error, self._largest_norm])
        self._largest_error, self._largest_norm = map(max, zip(*lengths, strict=True))

    @classmethod
    def load(cls, source: Source, mesh: Mesh | None, dtype: HeldDtype, name: str) -> Resident | None:
        """Puts the rows on the devices, or says why they do not fit.

        Args:
            source: the rows.
            mesh: over whose devices the rows are sharded, whatever its axes; None for the first device. Of several
                processes, each gives its own devices.
            dtype: how they are held.
            name: of the index, for the message.

        Returns:
            None, after a message with the arithmetic, where they do not fit.

        Raises:
            InputError: an unknown dtype, devices of other processes, or damaged vectors.
        """
        if dtype not in HELD:
            raise InputError(f"resident must be one of {', '.join(HELD)}, not {dtype!r}")
        devices = [jax.local_devices()[0]] if mesh is None else list(mesh.devices.flat)
        if any(device.process_index != jax.process_index() for device in devices):
            raise InputError("the mesh has devices of other processes; each process gives its own")
        shares = processes.gather([device.id for device in devices])
        free = min(
            free_memory(device) // (len(devices) if device.platform == "cpu" else 1) for device in devices
        )
        layout = Layout.fitting(
            source.count,
            source.dimension,
            dtype,
            sum(map(len, shares)),
            min(processes.gather(free)),
            block_sizes(),
        )
        fits = layout.fits(free)
        if not fits:
            logger.warning(
                "%s: as %s on %d devices, each would hold %d rows of %d bytes, %.2f GB, and %.2f GB beside them while "
                "it searches, of %.2f GB that are free (and rows are counted up to 2**31): the index is searched in "
                "blocks from disk, with the same results",
                name, dtype, layout.devices, layout.blocks * layout.rows, layout.row_bytes, layout.held / 1e9,
                layout.scratch / 1e9, free / 1e9,
            )  # fmt: skip
        if not all(processes.gather(fits)):
            return None
        by_id = {device.id: device for device in jax.devices()}
        everywhere = np.array([by_id[id] for share in shares for id in share])
        return cls(source, Mesh(everywhere, ("rows",)), dtype, layout)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        ids: Ids,
        otherwise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query, as `Index.search` returns them.

        Args:
            queries: float32 [Q, E], scaled to length 1 where the similarity is cosine. Of several processes each
                brings its own, perhaps none, and gets the answers to these.
            k: at most the number of rows; of several processes, the same in all of them.
            ids: the ids of some rows, asked for where scores are equal.
            otherwise: searches the queries of the given numbers in another exact way: those with more rows at the cut
                than there are ranks, and those whose candidates are not sure to hold the k best.

        Raises:
            InputError: a score is NaN or infinite.
        """
        asked, first = exchange(queries)
        parts = np.array_split(asked, max(1, -(-len(asked) // MAX_QUERIES)))
        kept = k + 1 if self.exact else min(self._source.count, max(4 * k, LEAST_CANDIDATES))
        started = [self._held.start(part, kept) for part in parts]
        scores = np.concatenate(
            [np.asarray(found)[: len(part)] for (found, _), part in zip(started, parts, strict=True)]
        )
        rows = np.concatenate(
            [np.asarray(found)[: len(part)] for (_, found), part in zip(started, parts, strict=True)]
        )
        own = slice(first, first + len(queries))
        scores, rows = scores[own], rows[own]
        if not len(queries):
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        if not np.isfinite(scores[:, : min(kept, self._source.count)]).all():
            raise InputError("the vectors are too large or damaged: a score is NaN or infinite")
        if self.exact:
            unsure = (scores[:, k - 1] == scores[:, k]) & np.isfinite(scores[:, k])
            scores, rows = scores[:, :k].copy(), rows[:, :k].astype(np.int64)
        else:
            scores, rows, unsure = self._rescored(queries, scores, rows.astype(np.int64), k)
        rows = self._source.rows(rows)
        in_order(scores, rows, ids)
        again = np.flatnonzero(unsure)
        if len(again):
            scores[again], rows[again] = otherwise(again)
        return scores, rows

    def _put_block(self, number: int) -> tuple[jax.Array, jax.Array | None]:
        """One block of every device: vectors [D * B, E] and for int8 their factors [D * B], sharded over rows."""
        size = self._layout.rows
        vectors, factors = [], []
        for position, device in enumerate(self._mesh.devices.flat):
            if device.process_index != jax.process_index():
                continue
            start = (position * self._layout.blocks + number) * size
            rows = np.arange(min(start, self._source.count), min(start + size, self._source.count))
            held = np.zeros((size, self._source.dimension), HELD[self.dtype])
            scales = np.zeros(size, np.float32)
            step = max(1, _CONVERTED // self._source.dimension)
            for first in range(0, len(rows), step):
                some = slice(first, min(first + step, len(rows)))
                self._convert(rows[some], held[some], scales[some])
            vectors.append(jax.device_put(held, device))
            factors.append(jax.device_put(scales, device))
        sharding = NamedSharding(self._mesh, P("rows"))
        total = self._mesh.devices.size * size
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


def exchange(queries: np.ndarray) -> tuple[np.ndarray, int]:
    """The queries [Q, E] float32 of all processes, in their order, and the position of the first of this process's."""
    if processes.count() == 1:
        return queries, 0
    ours = base64.b64encode(np.ascontiguousarray(queries, "<f4").tobytes()).decode()
    shares = [
        np.frombuffer(base64.b64decode(share), "<f4").reshape(-1, queries.shape[1])
        for share in processes.gather(ours)
    ]
    return np.concatenate(shares), sum(map(len, shares[: processes.index()]))
