"""A stream of tokenised texts to vectors: the device goes on from batch to batch while results are fetched."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.modules import Modules
from sgpt_jax.decoder.sharding import batch_sharding
from sgpt_jax.packing.layout import PlannedBatch, lay_out
from sgpt_jax.packing.rows import embed, rows_apart, texts_per_row, vector_indices
from sgpt_jax.runtime.one_behind import one_behind


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Texts that become vectors.

    Attributes:
        ids: their token ids.
        plans: the batches that they run in.
        skip: so many first tokens of each are left out of the pooling.
        vectors: float32 [m, D], that are to come.
        places: int [n], the rows of `vectors` that are theirs, in their order.
    """

    ids: list[list[int]]
    plans: list[PlannedBatch]
    skip: int
    vectors: np.ndarray
    places: np.ndarray

    def rows(self, plan: PlannedBatch) -> np.ndarray:
        """The rows of `vectors` that are those of a batch's texts."""
        return self.places[plan.texts]


@dataclasses.dataclass(frozen=True)
class _Started:
    """A batch that the device may still be working on; without a plan and a result, a chunk that has no texts."""

    chunk: Chunk
    plan: PlannedBatch | None = None
    room: int = 0
    result: jax.Array | None = None

    def keep(self) -> None:
        """Waits for the vectors and puts them into those of the chunk."""
        assert self.plan is not None
        vectors = np.asarray(self.result).reshape(-1, self.chunk.vectors.shape[1])
        self.chunk.vectors[self.chunk.rows(self.plan)] = vectors[vector_indices(self.plan, self.room)]


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """What makes vectors of packed rows.

    Attributes:
        decoder: the decoder.
        pooling, modules: see `embed`.
        pad_id: a valid token id for padding.
        mesh: the devices, or None for the first one.
    """

    decoder: Decoder
    pooling: str
    modules: Modules
    pad_id: int
    mesh: Mesh | None

    def vectors(
        self, chunks: Iterable[Chunk], normalize: bool, on_batch: Callable[[PlannedBatch], object]
    ) -> Iterator[np.ndarray]:
        """`Chunk.vectors` of each chunk, as soon as those of its texts are there; `on_batch` is called for every batch.

        Texts whose vectors are not finite are computed again in rows of their own: what stays so is theirs.
        """

        def fetch(started: _Started) -> _Started:
            if (plan := started.plan) is not None:
                started.keep()
                for apart in rows_apart(plan, started.chunk.vectors[started.chunk.rows(plan)]):
                    result = self._embed(started.chunk, apart, started.room, normalize)
                    _Started(started.chunk, apart, started.room, result).keep()
                on_batch(plan)
            return started

        for done in one_behind(self._start(chunks, normalize), fetch):
            if done.plan is None or done.plan is done.chunk.plans[-1]:
                yield done.chunk.vectors

    def _start(self, chunks: Iterable[Chunk], normalize: bool) -> Iterator[_Started]:
        """Starts one batch after the other."""
        for chunk in chunks:
            for plan in chunk.plans:
                room = texts_per_row(plan)
                yield _Started(chunk, plan, room, self._embed(chunk, plan, room, normalize))
            if not chunk.plans:
                yield _Started(chunk)

    def _embed(self, chunk: Chunk, plan: PlannedBatch, room: int, normalize: bool) -> jax.Array:
        """Starts a batch: float32 [R, room, D]."""
        structure, params = self._parts
        sharding = jax.local_devices()[0] if self.mesh is None else batch_sharding(self.mesh)
        return embed(
            structure,
            params,
            self.modules,
            jax.device_put(lay_out(plan, chunk.ids, self.pad_id), sharding),
            chunk.skip,
            pooling=self.pooling,
            room=room,
            dimension=chunk.vectors.shape[1],
            normalize=normalize,
            mesh=self.mesh,
        )

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        return split(self.decoder)


def warn_not_finite(vectors: np.ndarray, first: int = 0) -> None:
    """Warns of texts, counted from `first`, whose vectors are NaN or infinite; no other vector depends on them."""
    if len(broken := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        named = ", ".join(map(str, (first + broken[:5]).tolist())) + (", ..." if len(broken) > 5 else "")
        warnings.warn(
            f"{len(broken)} of {len(vectors)} texts have vectors that are not finite: number {named}, counted from 0",
            stacklevel=3,
        )
