"""An index as a file of FAISS or usearch, for those who serve with these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import PathLike, write_jsonl
from sgpt_jax.index.search import Index
from sgpt_jax.runtime.progress import progress

_ROWS = 1 << 15  # at a time


def export_index(index: Index, output: PathLike) -> Path:
    """Writes the vectors of an index to FILE.faiss or FILE.usearch, numbered from 0, and the ids beside it.

    Rows of removed documents are left out, so the numbers are those of the lines of ids, not the index's row numbers.

    FAISS gets an `IndexFlatIP`: float32, exact, the ranking of `Index.search`. usearch gets its graph (HNSW) with inner
    products, approximate, in float32 for an index of float32 and float16 otherwise. Where the similarity is cosine, the
    vectors have length 1 (those of float16 and int8 nearly), and queries should be scaled to that too.

    Args:
        index: the index. Both libraries hold the whole file in memory.
        output: the file; its ending says which library.

    Returns:
        the file of ids: line n, from 0, is `{"_id": id}` of vector n.

    Raises:
        InputError: another ending, the library is not installed, or the file cannot be written.
    """
    path = Path(output)
    writers = {".faiss": _write_faiss, ".usearch": _write_usearch}
    if path.suffix not in writers:
        raise InputError(f"{path}: an index is exported to FILE.faiss or FILE.usearch")
    ids = path.with_name(f"{path.name}.ids.jsonl")
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    try:
        writers[path.suffix](index, part)
        write_jsonl(ids, ({"_id": id} for rows in _blocks(index) for id in index.ids(rows)))
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return ids


def _blocks(index: Index) -> Iterator[np.ndarray]:
    for start in range(0, len(index), _ROWS):
        yield index.rows(start, start + _ROWS)


def _vectors(index: Index) -> Iterator[np.ndarray]:
    """The vectors of all documents that can be found, float32 [n, E] at a time."""
    with progress("exporting", "doc", len(index)) as bar:
        for rows in _blocks(index):
            yield index.vectors(rows)
            bar.update(len(rows))


def _write_faiss(index: Index, path: Path) -> None:
    try:
        import faiss
    except ImportError:
        raise _missing("FAISS", "faiss-cpu") from None
    flat: Any = faiss.IndexFlatIP(index.dimension)
    for vectors in _vectors(index):
        flat.add(vectors)
    faiss.write_index(flat, str(path))


def _write_usearch(index: Index, path: Path) -> None:
    try:
        from usearch.index import Index as Graph
    except ImportError:
        raise _missing("usearch", "usearch") from None
    dtype = "f32" if index.manifest.dtype == "float32" else "f16"
    graph: Any = Graph(ndim=index.dimension, metric="ip", dtype=dtype)
    for vectors in _vectors(index):
        graph.add(np.arange(len(graph), len(graph) + len(vectors), dtype=np.uint64), vectors)
    graph.save(str(path))


def _missing(library: str, package: str) -> InputError:
    return InputError(f"{library} is not installed: pip install {package}")
