"""Rows that stay on the devices of a mesh, each of which holds a share of them, and the search among them.

Every device finds the best of its own rows, block by block, so that no more than the scores of one block are ever in
memory; then the devices exchange these, so that each merges those of some queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sgpt_jax.index.device_top_k import look, merge_devices, nothing, split_in_three
from sgpt_jax.index.topk import CHUNK, MAX_QUERIES, padded_count
from sgpt_jax.runtime.platform import by_platform

HeldDtype = Literal["float32", "bfloat16", "int8"]
HELD: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}

# Elements of a block on one device. Small on a CPU, whose caches should hold the scores. Large on an accelerator with
# the memory for it, as the host starts a program for each block: an H200 reads 2**29 of bfloat16 in 0.26 ms, about the
# time of a start.
CPU_ELEMENTS, ACCELERATOR_ELEMENTS = (1 << 23,), (1 << 29, 1 << 27)
# Large blocks only where their scratch is at most this part of the free memory.
_SCRATCH_SHARE = 1 / 4


@dataclass(frozen=True)
class Layout:
    """How rows lie on devices, and the bytes of one device.

    Attributes:
        devices: over which the rows are sharded.
        blocks: of a device; each is searched by one call of a program.
        rows: of a block, padding included.
        row_bytes: of one row.
        held: by all rows of a device.
        scratch: beside them while it searches: scores of the most queries in three parts, of one block, and a block
            that is being converted.
    """

    devices: int
    blocks: int
    rows: int
    row_bytes: int
    held: int
    scratch: int

    @classmethod
    def of(cls, count: int, dimension: int, dtype: HeldDtype, devices: int, elements: int) -> Layout:
        """The layout of ``count`` rows, in blocks of about ``elements`` elements."""
        share = -(-count // devices)
        blocks = max(1, -(-share * dimension // elements))
        rows = -(-share // (blocks * CHUNK)) * CHUNK
        row_bytes = dimension * HELD[dtype].itemsize + (4 if dtype == "int8" else 0)
        scratch = 4 * MAX_QUERIES * rows * 4 + rows * dimension * 4
        return cls(devices, blocks, rows, row_bytes, blocks * rows * row_bytes, scratch)

    @classmethod
    def fitting(
        cls, count: int, dimension: int, dtype: HeldDtype, devices: int, free: float, sizes: Sequence[int]
    ) -> Layout:
        """The layout in the first of some sizes of blocks that fits well, or else in the last."""
        for elements in sizes:
            layout = cls.of(count, dimension, dtype, devices, elements)
            if layout.fits(free) and layout.scratch <= _SCRATCH_SHARE * free:
                break
        return layout

    def fits(self, free: float) -> bool:
        """Whether a device with so many bytes can hold and search its share; rows are counted up to 2**31."""
        return self.held + self.scratch <= free and self.blocks * self.rows * self.devices < 2**31


def block_sizes() -> Sequence[int]:
    """Elements of a block on a device of this process, best first."""
    return by_platform(cpu=CPU_ELEMENTS, accelerator=ACCELERATOR_ELEMENTS)


class Held:
    """The rows on the devices. Of several processes, all search at the same time."""

    def __init__(
        self,
        mesh: Mesh,
        dtype: HeldDtype,
        count: int,
        layout: Layout,
        put: Callable[[int], tuple[jax.Array, jax.Array | None]],
        calibration: np.ndarray | None = None,
    ) -> None:
        """Has all blocks put on the devices.

        Args:
            mesh: the devices, along its one axis "rows".
            dtype: of the vectors.
            count: how many rows; those behind them are padding.
            layout: of the rows.
            put: the number of a block to its vectors [D * B, E] and, of int8, their factors [D * B], sharded over
                "rows"; D is the number of devices and B that of a block's rows.
            calibration: of int8, [2, E]: mean and scale of each dimension.
        """
        self.mesh, self._calibration = mesh, calibration
        self._three_parts = dtype != "float32" and mesh.devices.flat[0].platform != "cpu"
        share = layout.blocks * layout.rows
        self._blocks = [
            (*put(number), self._replicated(np.array([number * layout.rows, share, count], np.int32)))
            for number in range(layout.blocks)
        ]

    def start(self, queries: np.ndarray, kept: int) -> tuple[jax.Array, jax.Array]:
        """Starts a search.

        Args:
            queries: [Q, E] float32, at most `MAX_QUERIES`.
            kept: how many rows a query.

        Returns:
            scores and rows [padded Q, kept], best first, -inf where none is.
        """
        devices = self.mesh.devices.size
        count = -(-padded_count(len(queries)) // devices) * devices
        queries = np.pad(queries, ((0, count - len(queries)), (0, 0)))
        offsets = np.zeros(count, np.float32)
        if self._calibration is not None:
            mean, scale = self._calibration
            offsets, queries = queries @ mean, queries * scale
        parts = split_in_three(queries) if self._three_parts else queries[None]
        placed, offsets = self._replicated(parts), self._replicated(offsets)
        best = nothing(self.mesh, devices, count, kept)
        for vectors, factors, position in self._blocks:
            best = look(self.mesh, best, placed, offsets, vectors, factors, position)
        return merge_devices(self.mesh, best)

    def _replicated(self, value: np.ndarray) -> Any:
        """The same on all devices; those of other processes get it from their own process."""
        return jax.make_array_from_callback(
            value.shape, NamedSharding(self.mesh, P()), lambda everything: value[everything]
        )
