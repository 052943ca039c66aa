"""A stream of tokenised texts to vectors: the device goes on from batch to batch while results are fetched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.modules import Modules
from sgpt_jax.decoder.sharding import batch_sharding
from sgpt_jax.packing.layout import PlannedBatch, lay_out
from sgpt_jax.packing.rows import embed, texts_per_row, vector_indices
from sgpt_jax.runtime.one_behind import one_behind


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Texts that become vectors.

    Attributes:
        ids: their token ids.
        plans: the batches that they run in.
        skip: so many first tokens of each are left out of the pooling.
        vectors: float32 [n, D], that are to come.
    """

    ids: list[list[int]]
    plans: list[PlannedBatch]
    skip: int
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Started:
    """A batch that the device may still be working on; without a plan and a result, a chunk that has no texts."""

    chunk: Chunk
    plan: PlannedBatch | None = None
    room: int = 0
    result: jax.Array | None = None


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
        """The vectors of each chunk, float32 [n, D]; `on_batch` is called for every batch that is done."""

        def fetch(started: _Started) -> _Started:
            if (plan := started.plan) is not None:
                vectors = np.asarray(started.result).reshape(-1, started.chunk.vectors.shape[1])
                started.chunk.vectors[plan.texts] = vectors[vector_indices(plan, started.room)]
                on_batch(plan)
            return started

        for done in one_behind(self._start(chunks, normalize), fetch):
            if done.plan is None or done.plan is done.chunk.plans[-1]:
                yield done.chunk.vectors

    def _start(self, chunks: Iterable[Chunk], normalize: bool) -> Iterator[_Started]:
        """Starts one batch after the other."""
        graphdef, params = split(self.decoder)
        sharding = jax.local_devices()[0] if self.mesh is None else batch_sharding(self.mesh)
        for chunk in chunks:
            for plan in chunk.plans:
                room = texts_per_row(plan)
                batch = jax.device_put(lay_out(plan, chunk.ids, self.pad_id), sharding)
                result = embed(
                    graphdef,
                    params,
                    self.modules,
                    batch,
                    chunk.skip,
                    pooling=self.pooling,
                    room=room,
                    dimension=chunk.vectors.shape[1],
                    normalize=normalize,
                    mesh=self.mesh,
                )
                yield _Started(chunk, plan, room, result)
            if not chunk.plans:
                yield _Started(chunk)
