"""Exact search in random vectors: an index of this project on disk and on the device, and its peers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgpt_jax.decoder.build import INT8_LIMIT
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.build import build_index
from sgpt_jax.index.held import Held, Layout, block_sizes
from sgpt_jax.index.resident import LEAST_CANDIDATES
from sgpt_jax.index.search import Index
from sgpt_jax.index.topk import MAX_QUERIES
from sgpt_jax.runtime.memory import free_memory

from .benchmark import Benchmark, threads
from .models import Torch

DIMENSION = 768
READ = "rows read once"  # the name of that run


def search_benchmark(count: int, num_queries: int, results: int, folder: str, *, alone: bool) -> Benchmark:
    """All runs that find the best of `count` vectors for each query, float32, by inner product.

    Args:
        count: vectors of dimension 768 and length 1.
        num_queries: Q.
        results: of a query.
        folder: an empty one, for the index.
        alone: leave the peers out.
    """
    random = np.random.default_rng(0)
    vectors, queries = (
        _unit(random.standard_normal((n, DIMENSION), np.float32)) for n in (count, num_queries)
    )
    results = min(results, count)
    index = build_index(
        Path(folder) / "index",
        (Document(f"{row:09}", str(row)) for row in range(count)),
        lambda chunks: (vectors[[int(row) for row in rows]] for rows in chunks),
        similarity="dot",
        store_texts=False,
    )

    resident = Index.open(index.folder, resident="float32")

    def by_numpy() -> np.ndarray:
        scores = queries @ vectors.T
        best = np.argpartition(-scores, results - 1, axis=1)[:, :results]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)

    benchmark = Benchmark(
        work={"vectors": count, "queries": num_queries, "results": results},
        unit="queries",
        runs={
            "ours": lambda: index.search(queries, results)[1],
            "ours, resident": lambda: resident.search(queries, results)[1],
        },
        flops={"": 2.0 * count * num_queries * DIMENSION},
        dtype="float32",
        compare=_overlap,
    )
    if alone:
        return benchmark
    benchmark.runs["numpy"] = by_numpy
    for name, peer in (("faiss", _faiss), ("usearch", _usearch)):
        try:
            benchmark.runs[name] = peer(vectors, queries, results)
        except ModuleNotFoundError as error:
            benchmark.left_out[name] = f"{error.name} is not installed"
    return benchmark


def held_benchmark(count: int, num_queries: int, results: int, dtype: Any, *, alone: bool) -> Benchmark:
    """The search among rows that stay on the first device, as `Index.open(resident=)` does it up to the candidates that
    the stored rows then decide between; the vectors are made on the device.

    "rows read once" is the limit for few queries: the largest value of every block. torch multiplies by queries rounded
    to bfloat16, a third of the work, and keeps no candidates.

    Args:
        count: vectors of dimension 768 and length about 1.
        num_queries: Q.
        results: of a query.
        dtype: of the vectors, "bfloat16" or "int8".
        alone: leave the peers out.

    Raises:
        InputError: they do not fit.
    """
    device, results = jax.devices()[0], min(results, count)
    layout = Layout.fitting(count, DIMENSION, dtype, 1, free_memory(device), block_sizes())
    if not layout.fits(free_memory(device)):
        sizes = f"{layout.held / 1e9:.1f} GB and {layout.scratch / 1e9:.1f} beside them"
        raise InputError(f"{count:,} vectors take {sizes}; {free_memory(device) / 1e9:.1f} are free")
    mesh = Mesh(np.array([device]), ("rows",))
    by_rows, shape = NamedSharding(mesh, PartitionSpec("rows")), (layout.rows, DIMENSION)
    deviation = DIMENSION**-0.5

    def normal(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(deviation)

    def uniform(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, shape, -INT8_LIMIT, INT8_LIMIT + 1, jnp.int8)

    make = jax.jit(normal if dtype == "bfloat16" else uniform, out_shardings=by_rows)
    blocks = [make(jax.random.key(number)) for number in range(layout.blocks)]
    factors = calibration = None
    if dtype == "int8":
        factors = jax.device_put(np.ones(layout.rows, np.float32), by_rows)
        scale = np.full(DIMENSION, deviation * 3**0.5 / INT8_LIMIT, np.float32)
        calibration = np.stack([np.zeros_like(scale), scale])
    held = Held(mesh, dtype, count, layout, lambda number: (blocks[number], factors), calibration)
    queries = _unit(np.random.default_rng(0).standard_normal((num_queries, DIMENSION), np.float32))
    kept = min(count, max(4 * results, LEAST_CANDIDATES))
    largest = jax.jit(jnp.max)

    def ours() -> np.ndarray:
        parts = np.array_split(queries, -(-num_queries // MAX_QUERIES))
        started = [held.start(part, kept) for part in parts]
        return np.concatenate(
            [np.asarray(rows)[: len(part), :results] for (_, rows), part in zip(started, parts, strict=True)]
        )

    benchmark = Benchmark(
        work={"vectors": count, "queries": num_queries, "results": results},
        unit="queries",
        runs={"ours": ours, READ: lambda: jax.block_until_ready([*map(largest, blocks)])},
        flops={"": 2.0 * count * num_queries * DIMENSION, READ: 0.0},
        dtype="bfloat16",
        compare=_overlap,
        facts={"bytes": layout.held, "blocks": layout.blocks},
    )
    if alone:
        return benchmark
    if dtype == "int8":
        benchmark.left_out["torch"] = "multiplies no floats by int8"
        return benchmark
    try:
        torch = Torch("bfloat16")
        benchmark.runs["torch"] = _in_torch(torch, blocks, count, queries, results)
        benchmark.facts |= torch.facts()
    except ModuleNotFoundError as error:
        benchmark.left_out["torch"] = f"{error.name} is not installed"
    return benchmark


def _in_torch(
    torch: Torch, blocks: list[jax.Array], count: int, queries: np.ndarray, results: int
) -> Callable[[], np.ndarray]:
    t, size = torch.torch, len(blocks[0])
    shared = [t.from_dlpack(block)[: count - number * size] for number, block in enumerate(blocks)]

    @t.inference_mode()
    def run() -> np.ndarray:
        asked = t.from_numpy(queries).to(torch.device, t.bfloat16)
        best = [t.topk(asked @ block.T, min(results, len(block))) for block in shared]
        scores = t.cat([found.values for found in best], 1)
        rows = t.cat([found.indices + number * size for number, found in enumerate(best)], 1)
        return rows.gather(1, t.topk(scores, results).indices).cpu().numpy()

    return run


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _faiss(vectors: np.ndarray, queries: np.ndarray, results: int) -> Callable[[], np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(threads())
    flat: Any = faiss.IndexFlatIP(DIMENSION)
    flat.add(vectors)
    with contextlib.suppress(AttributeError):  # the build for CPUs
        if faiss.get_num_gpus():
            flat = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat)
    return lambda: flat.search(queries, results)[1]


def _usearch(vectors: np.ndarray, queries: np.ndarray, results: int) -> Callable[[], np.ndarray]:
    from usearch.index import MetricKind, search

    return lambda: np.reshape(
        search(vectors, queries, results, MetricKind.IP, exact=True, threads=threads()).keys,
        (len(queries), -1),
    )


def _overlap(found: Mapping[str, Any]) -> dict[str, Any]:
    ours = found["ours"]
    return {
        f"results shared with {name}": float(
            np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(ours, found[name], strict=True)])
        )
        for name in found
        if name not in ("ours", "matmul", READ)
    }
