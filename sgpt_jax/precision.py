"""Vectors with fewer bits, as sentence-transformers' `quantize_embeddings` makes them: other libraries read these.

An index does not need this: `sgpt index --store int8` keeps its own int8, with measured recall.
"""

from __future__ import annotations

import typing

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.habits import Precision

PRECISIONS: tuple[str, ...] = typing.get_args(Precision)


def check_precision(precision: str) -> None:
    """Raises InputError for a precision that there is not."""
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")


def quantize_embeddings(
    vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None
) -> np.ndarray:
    """Vectors in another precision.

    int8 and uint8 have 256 equal buckets between the least and the greatest value of each dimension. Vectors can be
    compared only where their ranges are the same, so that queries want those of the documents: pass
    `np.stack([documents.min(0), documents.max(0)])` for both.

    Args:
        vectors: float32 [n, D].
        precision: "float32", "int8", "uint8", "binary" (the signs, 8 dimensions to an int8, the first in the highest
            bit, minus 128) or "ubinary" (the same in uint8, without the 128).
        ranges: float [2, D], the least and the greatest values for int8 and uint8; None takes those of the vectors.

    Returns:
        [n, D], or [n, ceil(D / 8)] of the binary ones.

    Raises:
        InputError: an unknown precision, or ranges would be those of one vector, or vectors or ranges are of another
            kind or shape, or ranges are not finite.
    """
    check_precision(precision)
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.dtype.kind not in "fV":  # bfloat16 is a V
        raise InputError(f"vectors must be float32 [n, D], not {vectors.dtype} {list(vectors.shape)}")
    if precision == "float32":
        return np.asarray(vectors, np.float32)
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - 128).astype(np.int8)
    if not len(vectors):
        return np.zeros(vectors.shape, precision)
    if ranges is None:
        if len(vectors) == 1:
            raise InputError(
                f"precision {precision!r} needs the range of every dimension, and one vector has none: encode several "
                "texts, or use sgpt_jax.precision.quantize_embeddings with ranges"
            )
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    ranges = np.asarray(ranges, np.float32)
    if ranges.shape != (2, vectors.shape[1]) or not np.isfinite(ranges).all():
        raise InputError(
            f"ranges must be finite, [2, {vectors.shape[1]}]: the least and the greatest value of every dimension, by "
            "default those of the vectors"
        )
    starts, ends = ranges
    steps = (ends - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    buckets = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    return buckets.astype(np.uint8) if precision == "uint8" else (buckets - 128).astype(np.int8)
