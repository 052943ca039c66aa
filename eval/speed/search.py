"""Exact search in random vectors: an index of this project on disk and on the device, FAISS flat, and NumPy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.files.corpora import Document
from sgpt_jax.index.build import build_index
from sgpt_jax.index.search import Index

from .benchmark import Benchmark, threads

DIMENSION = 768


def search_benchmark(count: int, num_queries: int, results: int, folder: str) -> Benchmark:
    """All runs that find the best of `count` vectors for each query, float32, by inner product.

    Args:
        count: vectors of dimension 768 and length 1.
        num_queries: Q.
        results: of a query.
        folder: an empty one, for the index.
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
            "numpy": by_numpy,
        },
        flops={"": 2.0 * count * num_queries * DIMENSION},
        dtype="float32",
        compare=_overlap,
    )
    for name, peer in (("faiss", _faiss), ("usearch", _usearch)):
        try:
            benchmark.runs[name] = peer(vectors, queries, results)
        except ModuleNotFoundError as error:
            benchmark.left_out[name] = f"{error.name} is not installed"
    return benchmark


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
        if name not in ("ours", "matmul")
    }
