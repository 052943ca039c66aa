"""What the device does for a server: vectors, log-probabilities, searches; by programs compiled at the start.

Each class here is a lane of `batching.Worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sgpt_jax.bi_encoder import DEFAULT_BATCH_TOKENS, BiEncoder, embed
from sgpt_jax.cross_encoder import BATCH_TOKENS, CrossEncoder
from sgpt_jax.decoder.log_probs import HEAD_ENTRIES, HEAD_POSITIONS, score_tokens
from sgpt_jax.decoder.model import split
from sgpt_jax.decoder.sharding import batch_sharding, batch_ways
from sgpt_jax.index.search import Index
from sgpt_jax.packing import rows as packed
from sgpt_jax.packing import shared
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.serve.shapes import Plan, Rows, Shape, choose, row_lengths, shapes

Fetch = Callable[[], Sequence[Any]]
"""Waits for a batch and gives the result of each of its items, in the order of the plan's."""


def _sharding(mesh: Any) -> Any:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else batch_sharding(mesh)


def _structs(arrays: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


class Embedder:
    """Token ids of texts (at most the model's limit each) to vectors, float32 [E], as the model's folder has them."""

    name = "embed"

    def __init__(self, model: BiEncoder) -> None:
        self.model = model
        self.budget = DEFAULT_BATCH_TOKENS.get(jax.default_backend(), 32768)
        if jax.default_backend() == "cpu":
            self.budget //= 4  # a batch of seconds would keep everybody waiting who comes next
        lengths = row_lengths(model.text.max_seq_length)
        several = [length for length in lengths if length in (128, 512, 2048) or length == lengths[-1]]
        self.shapes = shapes(lengths, self.budget, batch_ways(model.mesh), several)
        self._graphdef, self._params = split(model.decoder)
        self.programs = len(self.shapes)
        self._programs: dict[Shape, Any] = {}

    def compile(self) -> Iterator[Shape]:
        """Makes the programs, one at a time; yields the shape of each."""
        for shape in self.shapes:
            arrays, _ = packed.lay_out([[0]], self._batch(shape, [(0,)]), self.model.text.pad_id)
            lowered = embed.lower(
                self._graphdef,
                self._params,
                _structs(arrays, _sharding(self.model.mesh)),
                pooling=self.model.pooling,
                slots=packed.texts_per_row(shape.length),
                unit=self.model.normalized,
                mesh=self.model.mesh,
            )
            self._programs[shape] = lowered.compile()
            yield shape

    def plan(self, sizes: Sequence[int]) -> Plan:
        """Which of the waiting texts run now, packed into rows."""

        def fill(items: list[int], length: int) -> Rows:
            rows = packed.fill_rows([sizes[item] for item in items], lambda _: length)
            return [tuple(items[place] for place in row) for _, row in rows]

        return choose(sizes, self.shapes, self.budget, fill)

    def start(self, items: Sequence[list[int]], plan: Plan) -> Fetch:
        """Starts a batch; `items` are the texts of the plan, row by row."""
        numbers = iter(range(len(items)))
        batch = self._batch(plan.shape, [tuple(next(numbers) for _ in row) for row in plan.rows])
        arrays, places = packed.lay_out(items, batch, self.model.text.pad_id)
        result = self._programs[plan.shape](self._params, jax.device_put(arrays, _sharding(self.model.mesh)))
        return lambda: np.asarray(result).reshape(-1, self.model.dimension)[places]

    def _batch(self, shape: Shape, rows: Rows) -> packed.RowBatch:
        return packed.RowBatch(tuple(rows), shape.rows, shape.length, packed.texts_per_row(shape.length))


@dataclass(frozen=True)
class TokenPair:
    """A context, and the query tokens whose log-probabilities are asked for; neither is empty."""

    context: list[int]
    query: list[int]

    @property
    def size(self) -> int:
        """Tokens that the decoder reads; at least one for each that is predicted."""
        return max(len(self.context) + len(self.query) - 1, len(self.query))


class Scorer:
    """`TokenPair`s to the log-probabilities of their query tokens, float32 [n]."""

    name = "score"

    def __init__(self, model: CrossEncoder) -> None:
        self.model = model
        self.budget = BATCH_TOKENS.get(jax.default_backend(), 32768)
        lengths = [length for length in row_lengths(model.text.max_seq_length) if length > 32]
        self.shapes = shapes(lengths, self.budget, batch_ways(model.mesh), lengths)
        self._graphdef, self._params = split(model.decoder)
        self.programs = len(self.shapes)
        self._programs: dict[Shape, Any] = {}
        self._block = HEAD_POSITIONS.get(jax.default_backend(), 2048)

    def compile(self) -> Iterator[Shape]:
        """Makes the programs, one at a time; yields the shape of each."""
        mesh, config = self.model.mesh, self.model.decoder.config
        # Blocks of a vocabulary that is spread over devices would be gathered one by one.
        spread = mesh is not None and mesh.shape["tensor"] > 1
        for shape in self.shapes:
            arrays, _ = self._arrays([TokenPair([0], [0])], shape)
            lowered = score_tokens.lower(
                self._graphdef,
                self._params,
                *_structs(arrays, _sharding(mesh)),
                np.int32(1),
                positions_block=self._block,
                entries_block=config.vocab_size if spread else min(HEAD_ENTRIES, config.vocab_size),
                mesh=mesh,
            )
            self._programs[shape] = lowered.compile()
            yield shape

    def plan(self, sizes: Sequence[int]) -> Plan:
        """Which of the waiting pairs run now, a row each."""
        return choose(sizes, self.shapes, self.budget, lambda items, length: [(item,) for item in items])

    def start(self, items: Sequence[TokenPair], plan: Plan) -> Fetch:
        """Starts a batch."""
        arrays, work = self._arrays(items, plan.shape)
        blocks = np.int32(-(-max(work.counts) // self._block))
        placed = jax.device_put(arrays, _sharding(self.model.mesh))
        result = self._programs[plan.shape](self._params, *placed, blocks)

        def fetch() -> Sequence[np.ndarray]:
            found: list[Any] = [None] * len(items)
            for members, values in zip(work.pairs, np.asarray(result), strict=True):
                ends = np.cumsum([len(items[member].query) for member in members])
                for member, part in zip(members, np.split(values, ends), strict=False):
                    found[member] = part
            return found

        return fetch

    def _arrays(self, items: Sequence[TokenPair], shape: Shape) -> tuple[tuple[Any, ...], shared.Pass]:
        numbers = tuple(range(len(items)))
        work = shared.make_pass(
            shared.Batch(numbers, shape.rows, shape.length),
            [shared.Row(number, (number,), items[number].size) for number in numbers],
            [(number, number) for number in numbers],
            [item.context for item in items],
            [item.query for item in items],
            pad_id=self.model.text.pad_id,
            block=self._block,
            ways=batch_ways(self.model.mesh),
        )
        return (work.input_ids, work.positions, work.segments, work.slots, work.targets), work


@dataclass(frozen=True)
class Hits:
    """Documents of the index, best first: scores float32 [k], ids, and texts if the index has them."""

    scores: np.ndarray
    ids: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Wanted:
    """A query's vector, float32 [E], and how many documents it wants."""

    vector: np.ndarray
    k: int


class Searcher:
    """`Wanted` to `Hits`; fewer than k where the index has fewer documents."""

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

    def plan(self, sizes: Sequence[int]) -> Plan:
        """As many of the waiting queries as a pass over the index takes."""
        count = min(len(sizes), self.budget)
        rows = next(queries for queries in self._QUERIES if queries >= count)
        return Plan(Shape(rows, 1), [(item,) for item in range(count)])

    def start(self, items: Sequence[Wanted], plan: Plan) -> Fetch:
        """Searches for the queries together."""
        queries = np.ones((plan.shape.rows, self.index.dimension), np.float32)
        queries[: len(items)] = [item.vector for item in items]
        hits = next(hits for hits in self._HITS if hits >= max(item.k for item in items))
        scores, rows = self.index.search(queries, hits)
        return lambda: [
            self._hits(scores[number, : item.k], rows[number, : item.k]) for number, item in enumerate(items)
        ]

    def _hits(self, scores: np.ndarray, rows: np.ndarray) -> Hits:
        texts = self.index.texts(rows) if self.index.manifest.store_texts else [""] * len(rows)
        return Hits(scores, self.index.ids(rows), texts)


def queue_bound() -> int:
    """Tokens that may wait, by device: minutes of a CPU's work on a small decoder, seconds of an accelerator's."""
    return by_platform(cpu=1 << 18, accelerator=1 << 21)
