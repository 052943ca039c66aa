"""What the device does for a server: vectors, scores of pairs, searches; by programs compiled at the start.

Each class here is a lane of `batching.Worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sgpt_jax.bi_encoder import CPU_BATCH_TOKENS, BiEncoder
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.log_probs import score_tokens
from sgpt_jax.decoder.model import split
from sgpt_jax.decoder.readout import read_scores
from sgpt_jax.decoder.sharding import batch_sharding, num_shards
from sgpt_jax.index.search import Index
from sgpt_jax.own_scoring import OwnScoring
from sgpt_jax.packing.layout import BATCH_TOKENS, PlannedBatch, Row, lay_out
from sgpt_jax.packing.rows import embed, fill_rows, most_texts, rows_apart, vector_indices
from sgpt_jax.packing.shared import lay_out_targets
from sgpt_jax.query_scoring import batch_budget
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.serve.shapes import Shape, choose, row_lengths, shapes

Fetch = Callable[[], Sequence[Any]]
"""Waits for a batch and gives the result of each of its items, in the order of the plan's."""


def _sharding(mesh: Any) -> Any:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else batch_sharding(mesh)


def _structs(arrays: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


@dataclass(frozen=True)
class TokenText:
    """Token ids of a text, never none, and how many first ones are left out of the pooling."""

    ids: list[int]
    skip: int = 0


class Embedder:
    """`TokenText`s (at most the model's limit each) to vectors, float32 [E], as the model's folder has them."""

    name = "embed"

    def __init__(self, model: BiEncoder) -> None:
        self.model = model
        # On a CPU, a batch of seconds would keep everybody waiting who comes next.
        self.budget = by_platform(cpu=CPU_BATCH_TOKENS // 4, accelerator=BATCH_TOKENS)
        lengths = row_lengths(model.text.max_seq_length)
        several = [length for length in lengths if length in (128, 512, 2048) or length == lengths[-1]]
        self.shapes = shapes(lengths, self.budget, num_shards(model.mesh), several)
        self._structure, self._params = split(model.decoder)
        self.programs = len(self.shapes)
        self._programs: dict[Shape, Any] = {}

    def compile(self) -> Iterator[Shape]:
        """Makes the programs, one at a time; yields the shape of each."""
        for shape in self.shapes:
            lowered = embed.lower(
                self._structure,
                self._params,
                self.model.modules,
                *_structs(self._arrays([], shape.holding([])), _sharding(self.model.mesh)),
                pooling=self.model.pooling,
                room=most_texts(shape.length),
                dimension=self.model.dimension,
                normalize=False,
                mesh=self.model.mesh,
            )
            self._programs[shape] = lowered.compile()
            yield shape

    def plan(self, sizes: Sequence[int]) -> PlannedBatch:
        """Which of the waiting texts run now, packed into rows."""

        def fill(items: list[int], length: int) -> list[Row]:
            rows = fill_rows([sizes[item] for item in items], lambda _: length)
            return [Row(tuple(items[text] for text in row.texts), length) for row in rows]

        return choose(sizes, self.shapes, self.budget, fill)

    def start(self, items: Sequence[TokenText], plan: PlannedBatch) -> Fetch:
        """Starts a batch of some of the items. One whose vector is not finite leaves the others theirs."""

        def run(plan: PlannedBatch) -> Callable[[], np.ndarray]:
            placed = jax.device_put(self._arrays(items, plan), _sharding(self.model.mesh))
            result = self._programs[Shape.of(plan)](self._params, self.model.modules, *placed)
            indices = vector_indices(plan, most_texts(plan.length))
            return lambda: np.asarray(result).reshape(-1, self.model.dimension)[indices]

        first = run(plan)

        def fetch() -> Sequence[Any]:
            vectors = first()
            found = dict(zip(plan.texts, vectors, strict=True))
            for apart in rows_apart(plan, vectors):
                found |= zip(apart.texts, run(apart)(), strict=True)
            return list(found.values())

        return fetch

    def _arrays(self, items: Sequence[TokenText], plan: PlannedBatch) -> tuple[Any, np.ndarray]:
        room = most_texts(plan.length)
        skip = np.zeros((plan.num_rows, room), np.int32)
        skip.flat[vector_indices(plan, room)] = [items[item].skip for item in plan.texts]
        return lay_out(plan, [item.ids for item in items], self.model.text.pad_id), skip


@dataclass(frozen=True)
class TokenPair:
    """A context, and the query tokens whose log-probabilities are asked for; neither is empty."""

    context: list[int]
    query: list[int]

    @property
    def size(self) -> int:
        """Tokens that the decoder reads; at least one for each that is predicted."""
        return max(len(self.context) + len(self.query) - 1, len(self.query))


class _PairLane:
    """What both ways to score pairs share: a row for each pair, and few shapes."""

    name = "score"

    def __init__(self, model: CrossEncoder) -> None:
        self.model = model
        self.budget = batch_budget()
        lengths = [length for length in row_lengths(model.text.max_seq_length) if length > 32]
        self.shapes = shapes(lengths, self.budget, num_shards(model.mesh), lengths)
        self._structure, self._params = split(model.decoder)
        self.programs = len(self.shapes)
        self._programs: dict[Shape, Any] = {}

    def compile(self) -> Iterator[Shape]:
        """Makes the programs, one at a time; yields the shape of each."""
        for shape in self.shapes:
            self._programs[shape] = self._lower(shape.holding([])).compile()
            yield shape

    def _lower(self, plan: PlannedBatch) -> Any:
        """The program for batches like an empty one, not compiled."""
        raise NotImplementedError


class Scorer(_PairLane):
    """`TokenPair`s to the log-probabilities of their query tokens, float32 [n]."""

    def plan(self, sizes: Sequence[int]) -> PlannedBatch:
        """Which of the waiting pairs run now, a row each."""
        return choose(
            sizes,
            self.shapes,
            self.budget,
            lambda items, length: [Row((item,), length, prefix=item) for item in items],
        )

    def start(self, items: Sequence[TokenPair], plan: PlannedBatch) -> Fetch:
        """Starts a batch of some of the items."""
        arrays, owners = self._arrays(items, plan)
        placed = jax.device_put(arrays, _sharding(self.model.mesh))
        result = self._programs[Shape.of(plan)](self._params, *placed)
        # The targets of a row stand together, and rows in their order.
        ends = np.cumsum([len(items[item].query) for item in plan.texts])
        return lambda: np.split(np.asarray(result)[owners >= 0], ends[:-1])

    def _lower(self, plan: PlannedBatch) -> Any:
        arrays, _ = self._arrays([], plan)
        placed = _structs(arrays, _sharding(self.model.mesh))
        return score_tokens.lower(self._structure, self._params, *placed, mesh=self.model.mesh)

    def _arrays(self, items: Sequence[TokenPair], plan: PlannedBatch) -> tuple[tuple[Any, Any], np.ndarray]:
        contexts, queries = [item.context for item in items], [item.query for item in items]
        # A query's last token is predicted, but not read.
        batch = lay_out(plan, [query[:-1] for query in queries], self.model.text.pad_id, contexts)
        pairs = [(number, number) for number in range(len(items))]
        targets, owners = lay_out_targets(plan, pairs, contexts, queries, num_shards(self.model.mesh))
        return (batch, targets), owners


class PairReader(_PairLane):
    """Token ids of pairs to scores, float32 [], as a re-ranker's folder says."""

    def __init__(self, model: CrossEncoder, own: OwnScoring) -> None:
        super().__init__(model)
        self.own = own

    def plan(self, sizes: Sequence[int]) -> PlannedBatch:
        """Which of the waiting pairs run now, a row each."""
        return choose(
            sizes, self.shapes, self.budget, lambda items, length: [Row((item,), length) for item in items]
        )

    def start(self, items: Sequence[list[int]], plan: PlannedBatch) -> Fetch:
        """Starts a batch of some of the items."""
        placed = jax.device_put(self._arrays(items, plan), _sharding(self.model.mesh))
        result = self._programs[Shape.of(plan)](self._params, *placed, self.own.readout)
        return lambda: list(self.own.activate(np.asarray(result)[: len(plan.texts), 0]))

    def _lower(self, plan: PlannedBatch) -> Any:
        placed = _structs(self._arrays([], plan), _sharding(self.model.mesh))
        return read_scores.lower(
            self._structure, self._params, *placed, self.own.readout, mesh=self.model.mesh
        )

    def _arrays(self, items: Sequence[list[int]], plan: PlannedBatch) -> tuple[Any, np.ndarray]:
        tokens = np.zeros((plan.num_rows, 1), np.int32)
        tokens[: len(plan.texts), 0] = [self.own.index(items[item]) for item in plan.texts]
        return lay_out(plan, items, self.model.text.pad_id), tokens


@dataclass(frozen=True)
class Wanted:
    """A query's vector, float32 [E], and how many documents it wants."""

    vector: np.ndarray
    k: int


class Searcher:
    """`Wanted` to a list of `Hit`, best first; fewer than k where the index has fewer documents."""

    name = "search"
    # The programs of a search differ by these alone: by how many queries it is padded to, and how many hits it finds.
    _QUERIES, _HITS = (1, 4, 16), (16, 128, 1024)

    def __init__(self, index: Index) -> None:
        self.index = index
        self.budget = self._QUERIES[-1]
        self.programs = len(self._QUERIES) * len(self._HITS)

    @property
    def most(self) -> int:
        """The most documents that a query can have."""
        return self._HITS[-1]

    def compile(self) -> Iterator[Shape]:
        """Searches once in each shape."""
        for queries in self._QUERIES:
            for hits in self._HITS:
                self.index.search(np.ones((queries, self.index.dimension), np.float32), hits)
                yield Shape(queries, hits)

    def plan(self, sizes: Sequence[int]) -> PlannedBatch:
        """As many of the waiting queries as a pass over the index takes."""
        count = min(len(sizes), self.budget)
        queries = next(queries for queries in self._QUERIES if queries >= count)
        return Shape(queries, 1).holding([Row((item,), 1) for item in range(count)])

    def start(self, items: Sequence[Wanted], plan: PlannedBatch) -> Fetch:
        """Searches for some of the queries together."""
        asked = [items[item] for item in plan.texts]
        queries = np.ones((plan.num_rows, self.index.dimension), np.float32)
        queries[: len(asked)] = [item.vector for item in asked]
        hits = next(hits for hits in self._HITS if hits >= max(item.k for item in asked))
        scores, rows = self.index.search(queries, hits)
        return lambda: [
            self.index.hits(scores[number, : item.k], rows[number, : item.k])
            for number, item in enumerate(asked)
        ]


def queue_bound() -> int:
    """Tokens that may wait, by device: minutes of a CPU's work on a small decoder, seconds of an accelerator's."""
    return by_platform(cpu=1 << 18, accelerator=1 << 21)
