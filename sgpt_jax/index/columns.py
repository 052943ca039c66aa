"""What goes into the columns of an index: strings as bytes, vectors as int8."""

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import fix_surrogates
from sgpt_jax.index.files import CALIBRATION, DTYPES, Manifest, Shard


def checked_vectors(manifest: Manifest, chunk: list[Document], vectors: np.ndarray) -> np.ndarray:
    """Float32 vectors [n, E] of a chunk, normalised where the similarity says so.

    Raises:
        InputError: they have the wrong shape, or are not finite in the index's dtype.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(chunk) or not vectors.shape[1]:
        raise InputError(f"the encoder gave an array of shape {vectors.shape} for {len(chunk)} texts")
    if manifest.dimension not in (0, vectors.shape[1]):
        raise InputError(
            f"the encoder gives {vectors.shape[1]} dimensions, but the index has {manifest.dimension}"
        )
    manifest.dimension = vectors.shape[1]
    with np.errstate(all="ignore"):
        if manifest.similarity == "cosine":
            vectors = normalized(vectors)
        smallest = np.float16 if manifest.dtype == "float16" else np.float32
        broken = ~np.isfinite(vectors.astype(smallest))
    if broken.any():
        document = chunk[int(broken.any(axis=1).argmax())]
        raise InputError(f"document {document.id!r}: its vector has NaN or infinity in {manifest.dtype}")
    return vectors


def pack_columns(
    path: Path, manifest: Manifest, shard: Shard, chunk: list[Document], vectors: np.ndarray
) -> dict[str, bytes]:
    """The bytes that a chunk adds to each column."""
    columns: dict[str, bytes] = {}
    if manifest.dtype == "int8":
        codes, factors = quantize(vectors, load_calibration(path, manifest))
        columns |= {"vectors": codes.tobytes(), "scales": factors.astype("<f4").tobytes()}
    else:
        columns["vectors"] = vectors.astype(DTYPES[manifest.dtype]).tobytes()
    columns |= pack_strings([document.id for document in chunk], shard.id_bytes, "id")
    if manifest.store_texts:
        texts = [fix_surrogates(document.text) for document in chunk]
        columns |= pack_strings(texts, shard.text_bytes, "text")
        columns["title-sizes"] = np.array(
            [
                _title_size(fix_surrogates(document.title), text)
                for document, text in zip(chunk, texts, strict=True)
            ],
            "<u4",
        ).tobytes()
    return columns


def _title_size(title: str, text: str) -> int:
    """Bytes of the title at the beginning of the text; 0 where there is none."""
    return len(title.encode("utf-8")) if title.strip() and text.startswith(title) else 0


def pack_strings(values: Sequence[str], start: int, name: str) -> dict[str, bytes]:
    """The columns ``{name}s`` and ``{name}-ends`` of some strings, where the column has ``start`` bytes already."""
    encoded = [value.encode("utf-8") for value in values]
    ends = np.cumsum([len(value) for value in encoded], dtype=np.uint64) + np.uint64(start)
    return {f"{name}s": b"".join(encoded), f"{name}-ends": ends.astype("<u8").tobytes()}


def unpack_strings(blob: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> list[str]:
    """The strings in some rows of two columns.

    Raises:
        InputError: the columns contradict each other.
    """
    stops = ends[rows].astype(np.int64)
    starts = np.where(rows > 0, ends[rows - 1], 0).astype(np.int64)
    if ((starts < 0) | (starts > stops) | (stops > len(blob))).any():
        raise InputError("the index is damaged: strings end where there are none")
    view = memoryview(blob.data)
    try:
        return [
            str(view[start:stop], "utf-8")
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        ]
    except UnicodeDecodeError as error:
        raise InputError(f"the index is damaged: {error}") from error


def calibrate(vectors: np.ndarray) -> np.ndarray:
    """Mean and scale of each dimension for int8, [2, E] float32, from the first rows of an index [n, E].

    Decoders give vectors with a large common part and some dimensions far wider than others: the mean is taken
    off, and the wide dimensions get wider steps, so that narrow ones keep some. The scale is the square root of
    the standard deviation: of the powers from 0 to 1 it loses the least (SmolLM2-135M, recall@10 0.99, against
    0.95 with one scale a vector and nothing else). The variance is drawn towards the average of all dimensions
    as far as the rows are few.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    variance = vectors.var(axis=0, dtype=np.float64)
    prior = 32.0
    scale = np.power((len(vectors) * variance + prior * variance.mean()) / (len(vectors) + prior), 0.25)
    if not scale.all():  # a single row, or all rows the same
        scale = np.ones_like(mean)
    return np.stack([mean, scale]).astype(np.float32)


def quantize(vectors: np.ndarray, calibration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [n, E] and one float32 factor a row: ``vector = mean + scale * factor * code``, about."""
    centred = (vectors - calibration[0]) / calibration[1]
    factors = np.abs(centred).max(axis=1) / np.float32(127)
    codes = np.rint(centred / np.where(factors, factors, np.float32(1))[:, None])
    return codes.astype(np.int8), factors.astype(np.float32)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays."""
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1, keepdims=True))
    return (vectors / np.where(lengths, lengths, 1.0)).astype(np.float32)


def check_id(id: str, position: int) -> str:
    """The id itself.

    Raises:
        InputError: it is empty or holds a lone surrogate.
    """
    if not id or fix_surrogates(id) != id:
        raise InputError(f"document {position}: the id {id!r} is empty or holds a lone surrogate")
    return id


def array_bytes(value: np.ndarray) -> bytes:
    """One array as the bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def load_calibration(folder: Path, manifest: Manifest) -> np.ndarray:
    """Mean and scale of each dimension, [2, E] float32, see `calibrate`.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    path = folder / CALIBRATION
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if manifest.calibration is not None and zlib.crc32(raw) != manifest.calibration:
        raise InputError(f"{path}: is damaged: it does not fit its checksum in the manifest")
    try:
        value = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise InputError(f"{path}: is damaged: {error}") from error
    if value.shape != (2, manifest.dimension) or value.dtype != np.float32:
        raise InputError(f"{path}: is damaged: {value.dtype} of shape {value.shape}")
    return value
